"""Opens the door: builds the studio, launches the page with its limits, and loads the models behind it."""

import logging
import os
import signal
import sys
import threading
from types import FrameType

# Read by gradio and the Hub's client when they are imported: nothing is reported to anyone.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if "SPACE_ID" in os.environ:
    # A Space's proxy connects from a private address and names the client; uvicorn reads this.
    os.environ.setdefault("FORWARDED_ALLOW_IPS", "127.0.0.1,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16")

from medviz.errors import MedvizError
from medviz.limits import MAX_SHUTDOWN_S
from medviz.serving import address, private_folder
from medviz.studio import Studio


def main() -> int:
    """Serve until SIGINT or SIGTERM; HOST and PORT say where, MEDVIZ_MODELS with which models, MEDVIZ_HOSTS under which
    further names. Return the exit status: 1, after one line that names the cause, when the server cannot start."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # After each of its thousands of short operations drawing may wait so long for the page's own work (default: 5 ms).
    sys.setswitchinterval(0.0005)
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        host, port = address()
        with private_folder() as folder:
            os.environ["GRADIO_TEMP_DIR"] = str(folder)  # read by gradio when it is imported, too
            serve(host, port, stop)
    except MedvizError as error:
        sys.stderr.write(f"medviz cannot start: {error}\n")
        return 1
    return 0


def serve(host: str, port: int, stop: threading.Event) -> None:
    """Serve until `stop` is set; running requests may finish within MAX_SHUTDOWN_S. Raises ModelError."""
    from medviz.ui import build, launch_settings

    studio = Studio(os.environ.get("MEDVIZ_MODELS") or None)
    page = build(studio)
    page.launch(server_name=host, server_port=port, prevent_thread_lock=True, **launch_settings(host))
    # The page is up and shows stored examples; the first person to press Generate should not wait for imports.
    threading.Thread(target=studio.warm_up, name="warm-up", daemon=True).start()
    stop.wait()
    page.finish(MAX_SHUTDOWN_S)
    page.close()


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    sys.stdout.flush()
    # Everything is closed. Threads of libraries may still run, and taking the interpreter down under them aborts it.
    os._exit(status)
