"""The pages that people open, in a real browser: the MLflow UI on the default store and the service's own."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.testkit.projects import Project
from tests.testkit.servers import Service, running

CHROMIUM = shutil.which("chromium")
QUIET = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    if CHROMIUM is None:
        assert "CI" not in os.environ, "CI must have Chromium: .ci/run installs it"
        pytest.skip("Chromium is not installed; Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(30_000)
        expect.set_options(timeout=30_000)
        yield page
        browser.close()


@pytest.fixture
def mlflow_ui(trained: Project) -> Iterator[str]:
    env = {**trained.env, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = ("mlflow", "ui", "--port", "{port}", "--workers", "1")
    service = Service("mlflow ui", command, ready="/health", environment=env, folder=trained.folder)
    with running(service) as server:
        yield server.url


def test_mlflow_ui_shows_the_parent_and_its_trials(page: Page, mlflow_ui: str) -> None:
    found = httpx.post(f"{mlflow_ui}/api/2.0/mlflow/experiments/search", json={"max_results": 10}).json()
    experiment = next(item for item in found["experiments"] if item["name"] == "credit_risk")
    page.goto(f"{mlflow_ui}/#/experiments/{experiment['experiment_id']}/runs")
    expect(page.get_by_role("link", name=re.compile("^train credit-risk-"))).to_be_visible()
    parent = page.get_by_role("gridcell", name=re.compile("train credit-risk-"))
    parent.get_by_role("button").first.click()
    expect(page.get_by_role("link", name=re.compile("^trial 00[0-2]$"))).to_have_count(3)


def test_the_form_of_the_service_works_as_it_stands(page: Page, served: str) -> None:
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: wrong.append(message.text))
    page.goto(served)
    expect(page.locator("#body")).to_have_value(re.compile("income"))
    expect(page.locator("#curl")).to_contain_text(f"curl {served}/classify")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("status")).to_contain_text("200")
    answer = json.loads(page.get_by_label("Answer").inner_text())
    assert answer["Status"] in {"APPROVED", "MAYBE", "DECLINED"}
    page.get_by_label("Endpoint").select_option("/explain")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_label("Answer")).to_contain_text("contributions")
    assert all(url.startswith(served) for url in asked)
    assert [text for text in wrong if "favicon" not in text] == []


def test_the_form_sends_the_key_of_a_guarded_service(page: Page, promoted: Project) -> None:
    with promoted.serve(CREDIT_RISK_API_KEYS="secret") as url:
        page.goto(url)
        expect(page.get_by_role("status")).to_contain_text("401")
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Load the example").click()
        expect(page.locator("#body")).to_have_value(re.compile("income"))
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_label("Answer")).to_contain_text("Status")
