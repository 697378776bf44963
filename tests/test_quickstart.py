"""What the benchmark types is what README.md says."""

from checkout import ROOT

from benchmarks import quickstart


def test_commands_are_those_of_the_page():
    page = (
        "words\n```bash\nbash launch/local.sh     # installs\npython -m x --a=1 \\\n    --b=2\n"
        "bash launch/test.sh\n```\n```python\nimport jax\n```\n```\nnot code\n```\n"
    )
    assert quickstart.steps(page) == [
        ("bash", "bash launch/local.sh"),
        ("bash", "python -m x --a=1      --b=2"),
        ("python", "import jax\n"),
    ]


def test_the_readme_has_the_first_command_and_a_program():
    found = quickstart.steps((ROOT / "README.md").read_text())
    assert ("bash", "bash launch/local.sh") in found
    assert any(kind == "python" and "flow.sample" in what for kind, what in found)
    assert any("--help" in what for _, what in found)
