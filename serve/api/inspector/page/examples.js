// Three examples for a first visit.

const parameters = (max_tokens) => ({ max_tokens, temperature: 0 });

/** What an example shows: parameters and the prompt of a pane, or a decision. */
export const EXAMPLES = {
  fact: {
    parameters: parameters(16),
    editor: { mode: "text", text: "The capital of France is Paris. The capital of Italy is Berlin. The capital of Japan is", messages: [] },
  },
  chat: {
    parameters: parameters(40),
    editor: { mode: "chat", text: "", messages: [{ role: "user", content: "Why is the sky blue? Answer in one sentence." }] },
  },
  decision: {
    decide: {
      kind: "text",
      state: "The mug arrived broken. I would like my money back, please.",
      scoring: "",
      normalize: "",
      permutations: "",
      temperature: "",
      questions: [{ type: "predicate", name: "refund", instructions: "Does the customer want a refund?", options: [] }],
    },
  },
};
