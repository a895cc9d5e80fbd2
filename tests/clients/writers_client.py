"""Run by datatrove and datasets: the same documents as .bin/.idx, .jsonl.gz and parquet, for us to read."""

import json
import sys
from pathlib import Path

from datasets import Dataset
from datatrove.data import Document
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

folder, request, answer = sys.argv[1], sys.argv[2], Path(sys.argv[3])
asked = json.loads(Path(request).read_text(encoding="utf-8"))
texts = [text for text in asked["texts"] if text]
place = answer.parent
rows = Dataset.from_dict({"text": texts, "id": list(range(len(texts)))})
rows.to_json(place / "rows.jsonl.gz", compression="gzip")
rows.to_json(place / "rows_escaped.jsonl", force_ascii=True)
rows.to_parquet(place / "rows.parquet")
writer = MegatronDocumentTokenizer(
    str(place / "datatrove"), tokenizer_name_or_path=f"{folder}/tokenizer.json", eos_token="</s>"
)
writer.run((Document(text=text, id=str(i)) for i, text in enumerate(texts)), rank=0, world_size=1)
answer.write_text(json.dumps({"files": sorted(p.name for p in (place / "datatrove").iterdir())}))
