from __future__ import annotations

import re
from typing import Any

from llmkit.panel.device_bar import LOOKS, device_bar
from llmkit.schemas import Devices

GIB = 1 << 30
HOSTILE = "<script>alert(1)</script>\"'&"


def devices(gpus: list[dict[str, Any]] | None = None, **ram: Any) -> Devices:
    told = {"total_bytes": 32 * GIB, "used_bytes": 12 * GIB, "free_bytes": 20 * GIB, "limited_by": "machine", **ram}
    cpu = {"name": None, "cores": 2, "load": None}
    return Devices.model_validate({"cpu": cpu, "ram": told, "gpus": gpus or []})


def gpu(**fields: Any) -> dict[str, Any]:
    known = {"index": 0, "uuid": "GPU-1", "name": "NVIDIA H100", "total_bytes": 80 * GIB, "used_bytes": 0}
    return {**known, "free_bytes": 80 * GIB, **fields}


def widths(html: str) -> list[float]:
    return [float(found) for found in re.findall(r"width:([\d.]+)%", html)]


def words(html: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_ram_is_told_in_parts_with_the_name_of_each_model() -> None:
    shares = [{"model_id": "demo", "bytes": 2 * GIB}, {"model_id": "other", "bytes": 4 * GIB}]
    made = device_bar(devices(shares=shares, standby_bytes=GIB))
    assert words(made) == (
        "RAM 12.0 GiB of 32.0 GiB used demo 2.0 GiB other 4.0 GiB ready for the next load 1.0 GiB other use 5.0 GiB"
    )
    assert widths(made) == [6.25, 12.5, 3.12, 15.62]
    assert 'role="img" aria-label="RAM: 12.0 GiB of 32.0 GiB used"' in made


def test_a_limit_of_the_container_is_said() -> None:
    assert "limited by the container" in words(device_bar(devices(limited_by="cgroup")))
    assert "limited" not in device_bar(devices())


def test_a_gpu_is_told_with_its_name_its_shares_what_is_set_aside_and_how_busy_it_is() -> None:
    shares = [{"model_id": "demo", "bytes": 20 * GIB}]
    one = gpu(used_bytes=30 * GIB, reserved_bytes=8 * GIB, utilization=0.434, shares=shares)
    made = device_bar(devices([one, gpu(index=1)]))
    assert (
        "GPU 0 NVIDIA H100 30.0 GiB of 80.0 GiB used · 43% busy "
        "demo 20.0 GiB other use 10.0 GiB set aside for a load 8.0 GiB GPU 1 NVIDIA H100 0 B of 80.0 GiB used"
    ) in words(made)
    assert made.count('role="img"') == 3


def test_a_model_looks_the_same_everywhere_and_no_two_look_alike() -> None:
    names = [f"m{number}" for number in range(LOOKS)]
    shares = [{"model_id": name, "bytes": GIB} for name in names]
    made = device_bar(devices([gpu(shares=shares[1:2])], shares=shares))
    ram, _, card = made.partition("GPU 0")
    assert len(set(re.findall(r"llmkit-look-model-\d", ram))) == LOOKS
    assert set(re.findall(r"llmkit-look-model-\d", card)) == {"llmkit-look-model-1"}


def test_parts_that_are_more_than_what_is_used_still_fit() -> None:
    # They are measured one after the other, and another way than the whole.
    made = device_bar(devices(used_bytes=GIB, shares=[{"model_id": "a", "bytes": 30 * GIB}], standby_bytes=10 * GIB))
    assert sum(widths(made)) <= 100.01
    assert "other use" not in made


def test_what_is_not_known_is_said_and_takes_no_room() -> None:
    made = device_bar(devices(used_bytes=0, total_bytes=0, shares=[{"model_id": "a", "bytes": None}]))
    assert "a size not known" in words(made)
    assert widths(made) == []


def test_whatever_a_model_or_a_gpu_is_called_stays_text() -> None:
    shares = [{"model_id": HOSTILE, "bytes": GIB}]
    made = device_bar(devices([gpu(name=HOSTILE, shares=shares)], shares=shares))
    assert "<script" not in made
    assert made.count("&lt;script&gt;") == 3
