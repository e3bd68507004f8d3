#!/usr/bin/env bash
# Evaluate three small tasks with lm-evaluation-harness: log-likelihoods and texts from completions, texts from chat.
# Needs `pip install 'lm-eval[api]'`. Run from the repository's root: examples/lm_eval/run.sh [RESULTS_FOLDER]
# Set OPENAI_BASE_URL=http://host:port/v1 for another address, MODEL and MAX_LENGTH for another model.
set -eu
url=${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}
results=${1:-lm_eval_results}
model=${MODEL:-SmolLM2-135M-Instruct}
max_length=${MAX_LENGTH:-8192}  # the context of the model; the default of lm_eval is 2,048
tasks=tools/clients/lm_eval_tasks
curl -s -o /dev/null "$url/models" || { echo "no server at $url: start one with \`make serve\`" >&2; exit 1; }
command -v lm_eval > /dev/null || { echo "no lm_eval on PATH: pip install 'lm-eval[api]'" >&2; exit 1; }

# lm_eval uses the server's /tokenize (tokenizer_backend=auto), so no tokenizer is downloaded.
lm_eval run --model local-completions \
  --model_args "model=$model,base_url=$url/completions,tokenizer_backend=auto,max_length=$max_length" --batch_size 4 \
  --include_path "$tasks" --tasks logprobd_choice,logprobd_rolling,logprobd_generate \
  --output_path "$results/completions" --log_samples

lm_eval run --model local-chat-completions \
  --model_args "model=$model,base_url=$url/chat/completions,num_concurrent=2" --apply_chat_template \
  --include_path "$tasks" --tasks logprobd_generate \
  --output_path "$results/chat" --log_samples
