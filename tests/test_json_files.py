"""JSON objects in files: keys that are there twice, forms, and what is no file."""

import pytest

from beacon_jax.paths import is_there, parse_object, read_object


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1, "a": 2}', r"has the key 'a' more than once \(1, 2\): keep one"),
        ('{"b": [{"a": 1, "a": 1}]}', "has the key 'a' more than once"),
        ('{"a": ', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "has list where a JSON object is expected"),
        ("version https://git-lfs.github.com/spec/v1\n", "is a pointer of git-lfs"),
    ],
)
def test_what_is_no_object_with_keys_of_its_own_is_named(tmp_path, content, message):
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"x\.json {message}"):
        read_object(file)


def test_one_key_in_two_objects_is_no_repetition():
    assert parse_object(b'{"a": {"b": 1}, "c": {"b": 2}}', "x") == {
        "a": {"b": 1},
        "c": {"b": 2},
    }


def test_a_form_names_the_value_that_differs(tmp_path):
    file = tmp_path / "x.json"
    file.write_text('{"a": {"b": [1, "2"]}}')
    form = {"a": {"b": [int]}}
    with pytest.raises(ValueError, match=r"x\.json\.a\.b\[1\] is '2', not a whole num"):
        read_object(file, form)


def test_a_folder_and_a_link_to_nothing_are_no_files(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert not is_there(tmp_path / "nothing")
    with pytest.raises(ValueError, match="folder is a folder, and a file is expected"):
        read_object(tmp_path / "folder")
    with pytest.raises(ValueError, match="link is a link to a file that is gone"):
        read_object(tmp_path / "link")
