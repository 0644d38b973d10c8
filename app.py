"""Opens the door: builds the studio, launches the page with its limits, and loads the models behind it."""

import logging
import os
import sys
import threading

# Read by gradio and the Hub's client when they are imported: nothing is reported to anyone.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from medviz.studio import Studio
from medviz.ui import build, launch_settings


def main() -> None:
    """Serve until interrupted; HOST and PORT (or gradio's own variables) say where, MEDVIZ_MODELS with which models."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # After each of its thousands of short operations drawing may wait so long for the page's own work (default: 5 ms).
    sys.setswitchinterval(0.0005)
    studio = Studio(os.environ.get("MEDVIZ_MODELS") or None)
    host = os.environ.get("HOST") or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    port = os.environ.get("PORT") or os.environ.get("GRADIO_SERVER_PORT") or "7860"
    page = build(studio)
    page.launch(server_name=host, server_port=int(port), prevent_thread_lock=True, **launch_settings())
    # The page is up and shows stored examples; the first person to press Generate should not wait for imports.
    threading.Thread(target=studio.warm_up, name="warm-up", daemon=True).start()
    page.block_thread()


if __name__ == "__main__":
    main()
