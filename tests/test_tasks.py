import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sweep.errors import ConfigError
from sweep.planning import tasks
from sweep.planning.tasks import Kind, catalog, render, tasks_command


def write(folder: Path, **files: str) -> str:
    """The folder, after writing each text to `<name>.yaml`, or to `_name` (an include) where it starts with `_`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / (name if name.startswith("_") else f"{name}.yaml")).write_text(text)
    return str(folder)


# ---- lm-eval's own tasks


def test_what_was_read_of_a_folder_is_kept_until_one_of_its_files_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write(tmp_path / "tasks", one="include: _both\ntask: one\n", _both="dataset_path: a\ntag: [t, u]\n")
    first = tasks._kept(folder)
    with monkeypatch.context() as patched:
        patched.setattr(tasks, "_scan", None)
        assert tasks._kept(folder) == first
    write(tmp_path / "tasks", _both="dataset_path: another\n")
    assert tasks._kept(folder)["one"].head["dataset_path"] == "another"
    write(tmp_path / "tasks", two="task: two\n")
    assert set(tasks._kept(folder)) == {"one", "two"}
    for file in (tmp_path / "cache").rglob("*.msgpack"):
        file.write_bytes(b"{")
    assert set(tasks._kept(folder)) == {"one", "two"}


def test_all_that_lm_eval_has_is_kept_as_it_was_read(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = str(Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks")
    assert tasks._kept(folder) == tasks._kept(folder) == tasks._scan(folder, quick=True)[0]


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert set(tasks._kept(write(tmp_path / "tasks", one="task: one\n"))) == {"one"}


def test_lm_evals_well_known_names_are_found_with_their_kind():
    known = catalog()
    assert "gsm8k" in known.names(Kind.TASK)
    assert "mmlu" in known.names(Kind.GROUP)
    assert "mmlu_stem_tasks" in known.names(Kind.TAG)
    assert {"gsm8k", "mmlu", "mmlu_stem_tasks"} <= set(known.names())
    assert "gsm9k" not in known


def test_a_task_shows_what_its_yaml_says_with_includes_merged():
    info = catalog().info("mmlu_anatomy")
    assert (info.kind, info.output_type, info.num_fewshot) == (Kind.TASK, "multiple_choice", None)
    assert info.dataset == "cais/mmlu (anatomy)"
    assert info.path is not None
    assert info.path.endswith("mmlu_anatomy.yaml")
    assert not info.gated
    assert not info.unsafe_code
    assert catalog().info("gsm8k").num_fewshot == 5
    assert catalog().info("gsm8k").version == "3.0"


def test_a_group_shows_its_direct_members_and_counts_its_tasks():
    info = catalog().info("mmlu")
    assert info.members == ("mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities")
    assert info.subtasks == len(catalog().leaves("mmlu")) == 57
    assert info.dataset_path == "cais/mmlu"
    assert info.dataset_name is None


def test_a_tag_expands_to_its_tasks_by_alphabet():
    known = catalog()
    names = [leaf.name for leaf in known.leaves("mmlu_stem_tasks")]
    assert names == sorted(names)
    assert names == list(known.info("mmlu_stem_tasks").members)
    assert "mmlu_abstract_algebra" in names


def test_gated_and_code_executing_tasks_are_marked():
    known = catalog()
    assert known.info("gpqa_main_n_shot").gated
    assert known.info("leaderboard").gated
    assert known.info("humaneval").unsafe_code
    assert not known.info("gsm8k").unsafe_code


def test_an_unknown_name_is_refused_with_the_nearest_one_and_how_to_search():
    with pytest.raises(ConfigError) as error:
        catalog().require("gsm9k")
    assert str(error.value) == ("unknown task 'gsm9k'; did you mean 'gsm8k'? (`python launch.py tasks gsm` searches)")
    with pytest.raises(ConfigError, match=r"^unknown task '0'.*tasks <words>"):
        catalog().info("0")


def test_shots_that_lm_eval_would_drop_are_refused():
    known = catalog()
    with pytest.raises(ConfigError, match="num_fewshot: 5 would be ignored by lm-eval: 'humaneval' is pinned to 0"):
        known.check("humaneval", num_fewshot=5, unsafe_code=True)
    known.check("humaneval", num_fewshot=0, unsafe_code=True)
    known.check("humaneval", num_fewshot=None, unsafe_code=True)
    known.check("gsm8k", num_fewshot=3, unsafe_code=False)
    known.check("mmlu", num_fewshot=5, unsafe_code=False)


def test_code_execution_needs_confirmation_and_the_message_says_how():
    with pytest.raises(ConfigError, match=r"'humaneval' is marked unsafe .* set `unsafe_code: true`"):
        catalog().check("humaneval", num_fewshot=None, unsafe_code=False)
    with pytest.raises(ConfigError, match=r"4 of 4 subtasks of 'humaneval_infilling' \('humaneval_.*, \.\.\.\) are"):
        catalog().check("humaneval_infilling", num_fewshot=None, unsafe_code=False)


# ---- the user's own tasks


def test_a_number_that_a_task_of_lm_evals_cannot_give_is_known_before_it_runs():
    known = catalog()
    assert "did you mean 'exact_match,strict-match'" in known.missing("gsm8k", "exact_match")
    assert known.missing("gsm8k", "exact_match,flexible-extract") is None
    assert known.missing("mmlu", "acc") is known.missing("mmlu", "mmlu_anatomy/acc,none") is None
    assert known.missing("mmlu", "mmlu_stem/acc") is None
    assert "did you mean 'acc,none'" in known.missing("mmlu", "acc_norm")
    assert known.missing("mmlu_stem_tasks", "acc") is None  # each task of a tag stands for itself
    assert "no subtask 'mmlu_anatomi'; did you mean 'mmlu_anatomy'" in known.missing("mmlu", "mmlu_anatomi/acc")
    assert known.missing("ifeval", "of_its_own_code") is None
    assert "its filters are none" in known.missing("ifeval", "prompt_level_strict_acc,strict")


def test_a_users_task_wins_over_lm_evals_of_the_same_name_and_lm_eval_keeps_its_others(tmp_path):
    folder = write(tmp_path, gsm8k="task: gsm8k\ndataset_path: mine/gsm\noutput_type: generate_until\n")
    known = catalog([folder])
    assert known.info("gsm8k").dataset == "mine/gsm"
    assert known.info("hellaswag").dataset == "Rowan/hellaswag"
    assert catalog().info("gsm8k").dataset == "openai/gsm8k (main)"


def test_of_two_user_folders_the_later_wins_and_within_one_the_first_file(tmp_path):
    first = write(tmp_path / "1", a="task: own\ndataset_path: a\n", b="task: own\ndataset_path: b\n")
    second = write(tmp_path / "2", z="task: own\ndataset_path: z\n")
    assert catalog([first]).info("own").dataset == "a"
    assert catalog([first, second]).info("own").dataset == "z"


def test_names_tags_and_settings_may_come_from_an_include(tmp_path):
    folder = write(
        tmp_path,
        _template="task: own_included\ntag: [own_tag]\nnum_fewshot: 4\nunsafe_code: true\n!!str task_list: []\n",
        own="include: _template\nmetadata: {version: 1.5}\ndoc_to_text: !function made.up\n",
    )
    info = catalog([folder]).info("own_included")
    assert (info.num_fewshot, info.unsafe_code, info.version) == (4, True, "1.5")
    assert info.output_type == "generate_until"  # lm-eval's default
    assert catalog([folder]).info("own_tag").members == ("own_included",)


def test_a_task_written_in_python_is_a_task_of_unknown_output_type(tmp_path):
    folder = write(tmp_path, own="task: own_py\nclass: !function made.Up\ngroup: [ignored]\n")
    info = catalog([folder]).info("own_py")
    assert (info.kind, info.output_type, info.dataset) == (Kind.TASK, None, "")
    assert "in Python" in render([info])


GROUP = """
group: own_group
group_alias: Mine
num_fewshot: 2
task:
  - own_a
  - task: own_b
    num_fewshot: 0
  - group: own_inner
    task:
      - own_c
  - own_tag
  - task: inline
    dataset_path: openlanguagedata/flores_plus
metadata: {version: 3}
"""


def test_a_groups_settings_reach_its_tasks_as_lm_eval_applies_them(tmp_path):
    task = "task: {0}\ntag: {1}\noutput_type: multiple_choice\ndataset_path: d\nnum_fewshot: 9\n"
    folder = write(
        tmp_path,
        a=task.format("own_a", "x"),
        b=task.format("own_b", "x"),
        c=task.format("own_c", "x"),
        d=task.format("own_d", "own_tag"),
        group=GROUP,
    )
    known = catalog([folder])
    assert [(leaf.name, leaf.num_fewshot, leaf.gated) for leaf in known.leaves("own_group")] == [
        ("own_a", 2, False),
        ("own_b", 0, False),
        ("own_c", 2, False),
        ("own_d", 2, False),
        ("own_group::inline", 2, True),
    ]
    info = known.info("own_group")
    assert info.members == ("own_a", "own_b", "own_group::own_inner", "own_d", "own_group::inline")
    assert (info.version, info.subtasks, info.num_fewshot) == ("3", 5, None)
    assert known.info("own_a").num_fewshot == 9
    with pytest.raises(ConfigError, match=r"1 of 5 subtasks of 'own_group' \('own_b'\) is pinned to 0 shots"):
        known.check("own_group", num_fewshot=3, unsafe_code=False)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"include_path: no such folder: .*nowhere"):
        catalog([str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("task: own_broken\n  bad: [\n", "mapping values are not allowed"),
        ("task: own_broken\ninclude: _nowhere\n", "No such file"),
        ("task: own_broken\ninclude: own.yaml\n", "include cycle"),
        ("- task: own_broken\n", "expected a mapping"),
    ],
)
def test_a_broken_yaml_file_is_skipped_as_lm_eval_does_and_named_when_its_task_is_missed(tmp_path, text, reason):
    known = catalog([write(tmp_path, own=text)])
    with pytest.raises(ConfigError, match=rf"unknown task 'own_broken'.*cannot read .*own\.yaml: .*{reason}"):
        known.require("own_broken")


def test_a_group_that_contains_itself_is_refused_not_followed_for_ever(tmp_path):
    known = catalog([write(tmp_path, own="group: own_loop\ntask: [own_loop]\n")])
    with pytest.raises(ConfigError, match="expand 'own_loop'"):
        known.info("own_loop")


def test_a_group_that_lm_eval_cannot_build_is_listed_as_broken_and_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(tasks, "_screen", lambda: None)
    assert tasks_command(["t0_eval"])[0].splitlines()[1].split() == ["t0_eval", "group", "0", "broken"]
    with pytest.raises(ConfigError, match=r"'t0_eval' has neither `task` nor `group`"):
        catalog().check("t0_eval", num_fewshot=None, unsafe_code=False)


def test_a_group_without_tasks_is_refused(tmp_path):
    known = catalog([write(tmp_path, own="group: own_empty\ntask: gsm8k\n")])  # lm-eval wants a list
    with pytest.raises(ConfigError, match="'own_empty' has no tasks"):
        known.check("own_empty", num_fewshot=None, unsafe_code=False)


# ---- the quick look at a file


@pytest.mark.parametrize(
    "text",
    [
        "task: plain\ntag: some-tag\n",
        '"task": "quoted"\n\'tag\': \'it is\'\n"include": "_default"\n',
        "task: commented # why\n",
        "task: 123\ndataset_name: no\ndataset_path: null\n",
        "task: two words\ntag:\n  - a\n  - b\n",
        "task: last_line_without_newline",
        "task: crlf\r\ntag: x\r\n",
        "task: folded\n  name\n",
        "group: g\ntask:\n  - a\ntag: t\n",
        'description: "text\ntask: not_a_key\n"\ntask: real\n',
        'task: "caf\\u00e9"\ndataset_name: "zh-中文"\n',
        "include: ../up/_template.yaml\ntask: t\n  # a comment\ndataset_path: json\n",
        "tasks: x\n",
        "tag: &anchor x\ntask: *anchor\n",
    ],
)
def test_the_quick_look_reads_what_a_parser_reads_or_leaves_it_to_the_parser(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode())
    parsed = tasks._parse(str(path))
    quick = tasks._read_head(str(path))
    ignored = {"task"} if "group" in parsed else set()
    for key in set(tasks._HEAD) - ignored:
        assert quick.get(key) == parsed.get(key)


# ---- searching


def test_search_puts_the_exact_name_first_then_names_that_start_so_groups_before_tasks():
    found = catalog().search(["MMLU"])
    assert found[0] == "mmlu"
    assert found.index("mmlu_stem") < found.index("mmlu_anatomy") < found.index("global_mmlu_en")


def test_every_word_must_match_in_name_data_set_tags_or_output_type():
    known = catalog()
    assert "wikitext" in known.search(["wikitext", "rolling"])
    assert "gsm8k" in known.search(["openai/gsm8k"])
    assert "mmlu_anatomy" in known.search(["mmlu_stem_tasks", "anatomy"])
    assert known.search(["gsm8k", "rolling"]) == ()


def test_the_command_lists_matches_with_flags_and_what_they_mean(monkeypatch):
    monkeypatch.setattr(tasks, "_screen", lambda: None)
    text, _ = tasks_command(["gpqa", "main", "n_shot"])
    row = next(line for line in text.splitlines() if line.startswith("gpqa_main_n_shot"))
    assert row.split() == ["gpqa_main_n_shot", "task", "multiple_choice", "gated", "Idavidrein/gpqa", "(gpqa_main)"]
    assert "HF_TOKEN" in text


def test_the_command_tells_more_about_an_exact_match(monkeypatch):
    monkeypatch.setattr(tasks, "_screen", lambda: None)
    text, _ = tasks_command(["mmlu"])
    assert "mmlu = mmlu_stem, mmlu_other, mmlu_social_sciences, mmlu_humanities" in text
    assert "mmlu: version 2, " in text


@pytest.mark.parametrize("words", [[], ["mmlu"], ["a"]])
def test_on_a_terminal_the_command_fits_the_screen_and_says_how_much_more_there_is(monkeypatch, words):
    monkeypatch.setattr(tasks, "_screen", lambda: tasks.os.terminal_size((100, 24)))
    lines = tasks_command(words)[0].splitlines()
    assert len(lines) < 24
    assert any("..." in line for line in lines)
    if words:
        assert any(" more; add words" in line for line in lines)


def test_without_words_the_command_shows_the_main_groups_and_how_to_search(monkeypatch):
    monkeypatch.setattr(tasks, "_screen", lambda: None)
    text, found = tasks_command([])
    assert found
    names = text.split()
    assert "mmlu" in names
    assert "mmlu_stem" not in names
    assert "python launch.py tasks WORD" in text


def test_a_search_without_a_match_suggests_the_nearest_name(monkeypatch):
    monkeypatch.setattr(tasks, "_screen", lambda: None)
    text, found = tasks_command(["gsm9k"])
    assert "'gsm9k'; did you mean 'gsm8k'?" in text
    assert not found


def test_the_command_finds_the_users_tasks_too(tmp_path):
    folder = write(tmp_path, own="task: my_very_own\noutput_type: generate_until\n")
    assert tasks_command(["my_very"], [folder])[0].splitlines()[1].startswith("my_very_own")


def test_a_search_needs_neither_lm_eval_nor_anything_heavy():
    code = (
        "import sys; from sweep.planning.tasks import tasks_command; tasks_command(['mmlu', 'anatomy']);"
        "print([m for m in ('lm_eval', 'torch', 'datasets', 'transformers', 'ray', 'vllm') if m in sys.modules])"
    )
    root = Path(__file__).parent.parent
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
    assert time.monotonic() - started < 10  # 0.8 s on an idle machine


# ---- against the real TaskManager


@pytest.fixture(scope="module")
def manager():
    from lm_eval.tasks import TaskManager

    return TaskManager()


@pytest.mark.slow
def test_every_name_is_lm_evals(manager):
    known = catalog()
    assert list(known.names()) == manager.all_tasks
    assert list(known.names(Kind.TASK)) == manager.all_subtasks
    assert list(known.names(Kind.GROUP)) == manager.all_groups
    assert list(known.names(Kind.TAG)) == manager.all_tags
    for name in manager.all_tags:
        assert set(known.info(name).members) == manager.task_index[name].tags


@pytest.mark.slow
def test_every_head_is_what_lm_eval_parses(manager):
    known = catalog()
    for name, real in manager.task_index.items():
        if real.yaml_path is None:
            continue
        entry = known._entries[name]
        assert entry.path == str(real.yaml_path.resolve())
        keys = {"tag", "output_type", "dataset_path", "dataset_name"} if entry.kind is Kind.TASK else {"group"}
        for key in keys:
            assert entry.head.get(key) == real.cfg.get(key), (name, key)


@pytest.mark.slow
def test_every_group_and_tag_has_the_tasks_and_settings_that_lm_evals_factory_builds(manager, monkeypatch):
    """lm-eval's own factory, with a task class that loads no data set and YAML whose functions are not imported."""
    from lm_eval.api.task import Task
    from lm_eval.config.group import AggMetricConfig, GroupConfig
    from lm_eval.tasks import _factory

    class Hollow(Task):
        def __init__(self, config):
            self.plain = config

        @property
        def task_name(self):
            return self.plain["task"]

        has_training_docs = has_validation_docs = has_test_docs = doc_to_text = doc_to_target = None
        construct_requests = process_results = aggregation = higher_is_better = None

    def load_yaml(path, **_):
        config = dict(manager_yaml(str(path)))
        config.pop("class", None)
        return config

    manager_yaml = tasks._Yaml().load
    monkeypatch.setattr(_factory, "ConfigurableTask", Hollow)
    monkeypatch.setattr(_factory, "load_yaml", load_yaml)
    monkeypatch.setattr(AggMetricConfig, "__post_init__", lambda _: None)  # refuses functions that are only named
    assert set(GroupConfig.__dataclass_fields__) == tasks._GROUP_FIELDS
    known = catalog()
    python_made, broken = 0, []
    for name in [*manager.all_groups, *manager.all_tags]:
        try:
            built = manager.load(name)
        except (ValueError, TypeError):
            broken.append(name)
            with pytest.raises(ConfigError):
                known.leaves(name)
            continue
        expected = built["tasks"]
        leaves = known.leaves(name)
        assert [leaf.name for leaf in leaves] == list(expected), name
        for leaf in leaves:
            config = expected[leaf.name].plain
            assert leaf.num_fewshot == config.get("num_fewshot"), (name, leaf.name)
            assert leaf.dataset_path == config.get("dataset_path"), (name, leaf.name)
            assert leaf.unsafe_code == config.get("unsafe_code", False), (name, leaf.name)
            assert leaf.output_type in (None, config.get("output_type", "generate_until")), (name, leaf.name)
            python_made += leaf.output_type is None
        if name in manager.all_groups:
            assert list(known.info(name).members) == built["group_map"][name], name
    assert python_made < 100
    assert broken == ["t0_eval", "toksuite_abridged"]
