"""Versions made of what a test is about; nothing else in them matters."""

from typing import Any

from pipeline.models.versions import Version


def version(number: int = 1, **fields: Any) -> Version:
    given: dict[str, Any] = {
        "name": "nvae-faces",
        "version": str(number),
        "aliases": (),
        "created": "2026-11-20T12:00:00+00:00",
        "run_id": "0" * 32,
        "run_name": "faces",
        "url": f"s3://bucket/models/nvae-faces/{number}",
        "weights_sha256": f"{number:064x}",
        "manifest_sha256": f"{number:064x}",
        "images_seen": 100,
        "data_hash": "d1" * 32,
        "data_root": "s3://bucket/ffhq256",
        "code_version": "0.1.0",
        "parent": "",
        "run_ended": "finished",
        "metrics": {},
    }
    return Version(**(given | fields))
