"""A CSV file in any dialect becomes the same dataset, or one line names the cause and the switch."""

import gzip

import pandas as pd
import pytest
from test_import_logs import ID, assert_refused, following, import_logs, load, table, write


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A datasets folder of this test alone; tables are written beside it."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def imported_from(path, *arguments, dataset_id=ID):
    outcome = import_logs(path, *arguments, dataset_id=dataset_id)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    return load(dataset_id), outcome.stdout


@pytest.fixture
def plain(tmp_path):
    """What the dialects must all come to."""
    return imported_from(write(following(), tmp_path / "plain.csv"), dataset_id="test/plain-v0")[0].fingerprint


DIALECTS = {
    "semicolons": ({"sep": ";"}, "';' between columns (--delimiter)"),
    "tabs": ({"sep": "\t"}, r"'\t' between columns (--delimiter)"),
    "bars": ({"sep": "|"}, "'|' between columns (--delimiter)"),
    "decimal commas": (
        {"sep": ";", "decimal": ","},
        "';' between columns (--delimiter), ',' as decimal mark (--decimal)",
    ),
    "decimal commas in quotes": ({"decimal": ","}, "',' as decimal mark (--decimal)"),
    "UTF-16": ({"encoding": "utf-16"}, "text in UTF-16"),
    "all of it": (
        {"sep": "\t", "decimal": ",", "encoding": "utf-16"},
        r"'\t' between columns (--delimiter), ',' as decimal mark (--decimal), text in UTF-16",
    ),
    "lines of Windows": ({"lineterminator": "\r\n"}, ""),
    "a mark of UTF-8": ({"encoding": "utf-8-sig"}, ""),
    "Latin-1": ({"encoding": "latin-1"}, "text in LATIN-1"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", DIALECTS)
def test_dialects_are_found(name, zipped, tmp_path, plain):
    options, words = DIALECTS[name]
    note = "24 °C" if options.get("encoding") else "of no; interest, | at\tall"
    path = tmp_path / ("logs.csv.gz" if zipped else "logs.csv")
    following(note=note).to_csv(path, index=False, **options)
    buffer, said = imported_from(path)
    assert buffer.fingerprint == plain
    first = said.splitlines()[0]
    found = ", ".join(filter(None, (words, "gzip" * zipped)))
    assert first == (f"read with {found}" if found else "not used: note")


@pytest.mark.parametrize(("word", "mark"), [("tab", "\t"), (r"\t", "\t"), (";", ";"), ("#", "#"), (" ", " ")])
def test_a_delimiter_that_is_given(word, mark, tmp_path, plain):
    following().to_csv(tmp_path / "logs.tsv", index=False, sep=mark)
    assert imported_from(tmp_path / "logs.tsv", "--delimiter", word)[0].fingerprint == plain


def test_spaces_around_names_and_cells(tmp_path, plain):
    text = write(following(), tmp_path / "logs.csv").read_text()
    (tmp_path / "logs.csv").write_text(text.replace("\n", " \n").replace(",", " , "))
    buffer, _ = imported_from(tmp_path / "logs.csv")
    assert buffer.fingerprint == plain
    spaced = following().rename(columns=lambda name: f" {name} ")
    outcome = import_logs(write(spaced, tmp_path / "logs.parquet"), dataset_id="test/parquet-v0")
    assert outcome.returncode == 0 and load("test/parquet-v0").fingerprint == plain


def test_a_zipped_file_by_another_name(tmp_path, plain):
    path = write(following(), tmp_path / "logs.csv")
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert imported_from(path)[0].fingerprint == plain


ROWS = "episode;obs_0;action_0;reward;terminated\n1;{};0.5;1;0\n1;{};0.25;1;1\n"


def test_thousand_or_fraction_is_asked_for(tmp_path, folder):
    path = tmp_path / "logs.csv"
    path.write_text(ROWS.replace("0.5", "1").replace("0.25", "2").format("1,234", "2,345"))
    assert_refused(import_logs(path), "'1,234' is a thousand or a fraction: give --decimal , if these are", folder)
    assert_refused(
        import_logs(path, "--decimal", "."), "obs_0 holds numbers in another notation, such as '1,234'", folder
    )
    assert import_logs(path, "--decimal", ",").returncode == 0
    assert load().transitions.observations[:, 0].tolist() == pytest.approx([1.234, 2.345])


def test_points_of_thousands_are_no_fractions(tmp_path, folder):
    path = tmp_path / "logs.csv"
    path.write_text(ROWS.replace("0.5", "0,5").replace("0.25", "0,25").format("1.234", "2.345"))
    message = "action_0 holds numbers in another notation, such as '0,5' in row 1: write 0.5 for a half"
    assert_refused(import_logs(path), message, folder)
    message = "obs_0 holds numbers in another notation, such as '1.234' in row 1"
    assert_refused(import_logs(path, "--decimal", ","), message, folder)


def test_a_sign_and_an_exponent_with_decimal_commas(tmp_path):
    path = tmp_path / "logs.csv"
    path.write_text(ROWS.replace("0.5", "0,5").replace("0.25", "0,25").format("+1,5e1", "-,25"))
    assert import_logs(path).returncode == 0
    assert load().transitions.observations[:, 0].tolist() == [15, -0.25]


FILES = {
    "no header": (
        b"1,0.5,-1,1,0\n1,0.6,1,1,1\n",
        [],
        "it has 1, 0.5, -1, 1, 0: its first line holds numbers: add a header with the names of its columns",
    ),
    "decimal commas bare": (
        b"episode,obs_0,action_0,reward,terminated\n1,0,5,1,5,1,0\n",
        [],
        "Expected 5 columns, got 7: 1,0,5,1,5,1,0: decimal commas, or commas in text, need quotes or another --deli",
    ),
    "zeros": (b"e\0p\0i\0", [], "it holds bytes of zero, so it is no text, or UTF-16 without a mark: save it as text"),
    "long delimiter": (b"episode;;obs_0", ["--delimiter", ";;"], "--delimiter ';;': give one character, or tab"),
    "wrong delimiter": (
        b"episode,obs_0\n",
        ["--delimiter", ";"],
        "has one column, episode,obs_0: its first line must be the header, and --delimiter names",
    ),
    "decimal": (b"episode,obs_0\n", ["--decimal", "x"], "--decimal x: give . or ,"),
    "broken gzip": (gzip.compress(b"episode,obs_0\n" * 99)[:-9], [], "cannot read"),
}


@pytest.mark.parametrize("name", FILES)
def test_refuses_csv_files(name, tmp_path, folder):
    content, arguments, message = FILES[name]
    (tmp_path / "logs.csv").write_bytes(content)
    assert_refused(import_logs(tmp_path / "logs.csv", *arguments), message, folder)


def test_a_delimiter_is_for_csv_alone(tmp_path, folder):
    path = write(table(), tmp_path / "logs.parquet")
    assert_refused(import_logs(path, "--delimiter", ";"), "--delimiter is for CSV files, which ", folder)


def test_decimal_commas_in_text_of_parquet(tmp_path, folder):
    values = table(obs_2=[f"{row},5" for row in range(6)])
    path = write(values, tmp_path / "logs.parquet")
    assert_refused(import_logs(path), "column obs_2 holds numbers in another notation, such as '0,5' in row 1", folder)
    assert import_logs(path, "--decimal", ",").returncode == 0
    assert load().transitions.observations[:, 0].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]


def test_a_header_of_rows_that_are_repeated(tmp_path, folder):
    """As where files were put one behind the other."""
    text = table().to_csv(index=False)
    (tmp_path / "logs.csv").write_text(text + text)
    assert_refused(import_logs(tmp_path / "logs.csv"), "row 8, column episode: 'b' comes again after", folder)


def test_an_index_without_a_name_is_not_used(tmp_path, plain):
    following().to_csv(tmp_path / "logs.csv")
    buffer, said = imported_from(tmp_path / "logs.csv")
    assert buffer.fingerprint == plain and said.startswith("not used: note\n")
    assert pd.read_csv(tmp_path / "logs.csv").columns[0] == "Unnamed: 0"
