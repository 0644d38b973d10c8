"""What a reader is told and asked. A protocol keeps its own copy, so that later changes here alter no running study."""

from medviz.study.protocol import Choice, Task

CONSENT = (
    "You are asked to take part in a research study of medical images. You will look at images one after another and "
    "answer one question about each. Some facts about the images are told only at the end, because knowing them would "
    "change your answers. Your specialty, your years of experience, your answers, the time of each answer and the size "
    "of your display are stored. Your name is not. Taking part is voluntary: you may stop at any time by closing the "
    "page, and go on later with your reader code. An answer cannot be changed. No image may be used for diagnosis."
)

CLOSING = (
    "Thank you. The images came from generative models trained on medical images, and where the study had them, from "
    "real examinations. The study compares a baseline model with an aligned model. You were not told so before the "
    "first part, so that your ratings would not depend on it. If you wish to withdraw your answers, write to the "
    "person who invited you."
)

RATING = Task(
    "rating",
    "Part A. Rate the quality of each image, as you would judge an image from another department. Use the whole scale.",
    "How good is the quality of this image for reading?",
    (
        Choice("1", "Unacceptable"),
        Choice("2", "Poor"),
        Choice("3", "Acceptable"),
        Choice("4", "Good"),
        Choice("5", "Excellent"),
    ),
)

DETECTION = Task(
    "detection",
    "Part B. Some images are real and some are synthetic, that is, drawn by a computer model. The shares are not "
    "told. Say for each image which it is, and how sure you are.",
    "Is this image real or synthetic?",
    (
        Choice("1", "Definitely real"),
        Choice("2", "Probably real"),
        Choice("3", "Possibly real"),
        Choice("4", "Possibly synthetic"),
        Choice("5", "Probably synthetic"),
        Choice("6", "Definitely synthetic"),
    ),
)

PREFERENCE = Task(
    "preference",
    "Part C. Two images were made for one description. Choose the one that shows more of what the description says. "
    "Choose 'No difference' when neither does.",
    "Which image matches the description better?",
    (Choice("left", "Left image"), Choice("tie", "No difference"), Choice("right", "Right image")),
)

TASKS = {task.phase: task for task in (RATING, DETECTION, PREFERENCE)}
