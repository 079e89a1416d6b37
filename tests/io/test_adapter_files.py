import pytest

from mpifedlora.errors import AdapterError
from mpifedlora.io.adapter_files import LABELS_FILE, read_base_weights, read_labels, write_labels


def test_labels_are_read_as_written(tmp_path):
    write_labels(tmp_path, ["food", "müsic"])
    assert read_labels(tmp_path) == ["food", "müsic"]


@pytest.mark.parametrize("content", [b"", b"\xff", b'{"a": 1}', b"[1]", b"[" * 100_000])
def test_labels_of_another_kind_are_refused_by_name(tmp_path, content):
    (tmp_path / LABELS_FILE).write_bytes(content)
    with pytest.raises(AdapterError, match=r"labels\.json must be as the run has written it"):
        read_labels(tmp_path)


def test_damaged_base_weights_are_refused_by_name(tmp_path):
    (tmp_path / "base_model").mkdir()
    (tmp_path / "base_model" / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(AdapterError, match=r"model\.safetensors must be as the run has written it"):
        read_base_weights(tmp_path)
