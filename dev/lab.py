"""JupyterLab without a screen, driven by Playwright; for test_browser.py and screenshots.py.

    with jupyter(home, folder) as lab:
        page = lab.open("cells", ["1 + 1", "2 + 2"])
        page.run(0)
        page.output(0).get_by_text("2").wait_for()
"""
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat

CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
ANNOUNCEMENTS = "@jupyterlab/apputils-extension:announcements"
SECONDS = 60


class Notebook:
    """A notebook that is open in the browser; cells are counted from 0."""

    def __init__(self, tab):
        self.tab = tab

    def command(self, name, **args):
        """A command of JupyterLab, without waiting for its end."""
        self.tab.evaluate("([name, args]) => { window.jupyterapp.commands.execute(name, args); }", [name, args])

    def cell(self, i):
        return self.tab.locator(".jp-NotebookPanel:visible .jp-Cell").nth(i)

    def output(self, i):
        return self.cell(i).locator(".jp-Cell-outputWrapper")

    def run(self, i, seconds=SECONDS):
        """Run a code cell by Shift-Enter and wait until it has a number."""
        self.cell(i).locator(".cm-content").click()
        self.tab.keyboard.press("Shift+Enter")
        self.ran(i, seconds)

    def ran(self, i, seconds=SECONDS):
        """Wait until a cell has a number; an error in any cell ends the test at once."""
        self.until(lambda: re.search(r"\[\d+\]", self.cell(i).locator(".jp-InputPrompt").inner_text()) or self.errors().count(), seconds)
        assert not self.errors().count(), self.errors().first.inner_text()

    def errors(self):
        return self.tab.locator(".jp-NotebookPanel:visible [data-mime-type='application/vnd.jupyter.error']")

    def run_all(self, seconds=SECONDS):
        """Run every cell; the last one must hold code."""
        self.command("notebook:run-all-cells")
        self.ran(self.tab.locator(".jp-NotebookPanel:visible .jp-Cell").count() - 1, seconds)

    def idle(self, seconds=SECONDS):
        """Wait until the kernel is there, connected and has nothing to do; a cell that is run before is passed over without a word."""
        self.tab.wait_for_function(
            "() => { const k = window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel; return k?.connectionStatus == 'connected' && k.status == 'idle'; }",
            timeout=1000 * seconds)
        self.tab.locator(".jp-NotebookPanel:visible .jp-Notebook-ExecutionIndicator[data-status='idle']").wait_for(timeout=1000 * seconds)

    def until(self, condition, seconds=SECONDS):
        """Wait for something that is not in the page, or not as a single element."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"nothing after {seconds} s; the page says: {self.tab.locator('.jp-NotebookPanel:visible').inner_text()[:2000]}"
            self.tab.wait_for_timeout(200)

    def restart(self):
        """Restart the kernel, as the button in the toolbar does; outputs stay."""
        self.command("notebook:restart-kernel")
        self.tab.locator(".jp-Dialog .jp-mod-accept").click()
        self.tab.locator(".jp-Dialog").wait_for(state="detached")
        self.idle()

    def close(self):
        self.tab.close()


class Lab:
    """A running JupyterLab and a browser that looks at it."""

    def __init__(self, folder, browser, url, settings):
        self.folder, self.browser, self.url, self.settings = folder, browser, url, settings

    def setting(self, extension, plugin, **values):
        file = self.settings / extension / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))

    def open(self, name, cells=None, dark=False, size=(1280, 1000)):
        """Open FOLDER/NAME.ipynb, written anew from the sources `cells` if there are any."""
        if cells is not None:
            nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
            nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
            nbformat.write(nb, self.folder / f"{name}.ipynb")
        self.setting("@jupyterlab/apputils-extension", "themes", theme="JupyterLab Dark" if dark else "JupyterLab Light")
        self.setting("@jupyterlab/notebook-extension", "tracker", windowingMode="none")
        tab = self.browser.new_page(viewport={"width": size[0], "height": size[1]})
        tab.set_default_timeout(1000 * SECONDS)
        tab.goto(f"{self.url}/lab/tree/{name}.ipynb?reset")
        notebook = Notebook(tab)
        tab.locator(".jp-NotebookPanel:visible .jp-Cell").first.wait_for()
        notebook.idle()
        return notebook


@contextmanager
def jupyter(home, folder):
    """JupyterLab on `folder`, with settings of its own in `home`, and a browser."""
    from playwright.sync_api import sync_playwright

    from qlora_kit.training.engine import free_port

    port, settings = free_port(), home / "settings"
    (home / "labconfig").mkdir()
    (home / "labconfig/page_config.json").write_text(json.dumps({"disabledExtensions": {ANNOUNCEMENTS: True}}))
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(home), "JUPYTER_DATA_DIR": str(home / "data"), "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
           "JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"), "IPYTHONDIR": str(home / "ipython"),
           "IN_TEST": "1", "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # IN_TEST: the last cell of a page exports nothing; threads that share a core with others wait for each other
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=", "--expose-app-in-browser",
               f"--ServerApp.root_dir={folder}", "--ServerApp.port_retries=0"]
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(command, env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + SECONDS
        while not answers(f"{url}/api"):
            assert server.poll() is None and time.monotonic() < deadline, (home / "log").read_text()[-3000:]
            time.sleep(0.2)
        with sync_playwright() as p:
            browser = p.chromium.launch(executable_path="/usr/bin/chromium", args=CHROMIUM)
            yield Lab(folder, browser, url, settings)
            browser.close()
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False
