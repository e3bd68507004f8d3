#!/usr/bin/env bash
# Chat with a running server through the command `llm` (pip install llm), and a completion whose log-probs llm logs.
# Set OPENAI_BASE_URL=http://host:port/v1 for another address. Your own llm settings are not touched.
set -eu
LLM_USER_PATH=$(mktemp -d)
export LLM_USER_PATH
trap 'rm -r "$LLM_USER_PATH"' EXIT

# Add these entries to extra-openai-models.yaml in the folder printed by `dirname "$(llm logs path)"`.
cat > "$LLM_USER_PATH/extra-openai-models.yaml" << YAML
- model_id: logprobd
  model_name: ${MODEL:-SmolLM2-135M-Instruct}
  api_base: ${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}
- model_id: logprobd-completion
  model_name: ${MODEL:-SmolLM2-135M-Instruct}
  api_base: ${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}
  completion: true
YAML

question="What is the capital of France?"
echo "== chat"
llm -m logprobd -o temperature 0 -o max_tokens 32 --no-stream "$question"
echo "== stream"
llm -m logprobd -o temperature 0 -o max_tokens 32 "$question"
echo "== completions"
llm -m logprobd-completion -o temperature 0 -o max_tokens 4 -o logprobs 2 "The capital of France is"
echo "== logged"
llm logs -n 1 --json
