"""A blinded reader study: a frozen protocol, durable answers, and statistics with readers and cases crossed.

A page needs `Study` alone:

```python
from medviz.study import Study

study = Study("studies/dermatology", real_images="/path/of/the/users/own/images")
study.consent                                      # text to agree to
code = study.start(consent=True, specialty="dermatology", years=8, display="1920x1080@1")
                                                   # show the code once: it is the only way to resume
while (item := study.next_item(code)) is not None: # an Item; the same one until it is answered
    item.phase, item.practice, item.number, item.total
    item.starts_part, item.instructions            # show the instructions first where starts_part is true
    item.question, item.choices, item.prompt       # prompt is empty but in the preference phase
    item.images                                    # PNG bytes, left to right; two in the preference phase
    study.answer(code, item.position, value="left", response_ms=2300, zoom=1.5, display="1920x1080@1")
study.progress(code).finished                      # True
study.closing                                      # text that tells what was kept back until the end
```

An answer is on the disk when `answer` returns, and may be sent again when its acknowledgement was lost. There is no way
back. Every call raises `InputError` with a sentence for the reader. Calls are safe from several threads and processes.

The images carry no visible label and no metadata: a reader must not be told what is synthetic. A page must therefore
offer no download of them, and say in its frame that images of the study serve no diagnosis.

Modules: `protocol` and `texts` (what is frozen), `design` (drawing up a protocol), `schedule` (order and sides),
`store` and `session` (a running study), `answers` (the table that is analysed), `mrmc`, `mixed`, `agreement`,
`equivalence` and `statistics` (the analysis), `simulation` and `planner` (readers of known behaviour, power), `report`,
`checklist` and `exports` (what is handed in). The statistics need the extra `medviz[study]`.
"""

from medviz.study.protocol import Protocol, read_protocol
from medviz.study.session import Item, Progress, Study

__all__ = ["Item", "Progress", "Protocol", "Study", "read_protocol"]
