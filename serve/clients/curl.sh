#!/usr/bin/env bash
# The same endpoint with curl: OpenAI's route, and that of text-embeddings-inference.
set -euo pipefail

base_url=${BASE_URL:-http://127.0.0.1:8000}
headers=(-H 'Content-Type: application/json' -H "Authorization: Bearer ${API_KEY:-none}")

curl -fsS "$base_url/v1/embeddings" "${headers[@]}" -d '{"input": ["first text", "second text"], "dimensions": 4}'
echo
curl -fsS "$base_url/embed" "${headers[@]}" -d '{"inputs": "one text", "dimensions": 4}'
echo
