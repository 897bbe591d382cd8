"""Text from an exported folder, by stock transformers alone: `python launch/sample.py FOLDER [PROMPT ...]`.

What a user of an exported model would write. It fails when forgather was imported on the way: an export stands alone.
"""

import argparse
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="what `forgather export` wrote")
    parser.add_argument("prompt", nargs="*", default=["def __init__(self", "import "], help="texts to continue")
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    # A Forgather model is code that travels with its weights; to transformers that is remote code.
    tokenizer = AutoTokenizer.from_pretrained(options.folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(options.folder, trust_remote_code=True).eval()
    set_seed(options.seed)
    for prompt in options.prompt:
        tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        output = model.generate(
            input_ids=tokens.input_ids,
            max_new_tokens=options.max_new_tokens,
            do_sample=True,
            temperature=options.temperature,
            top_p=0.95,
        )
        print(f"--- {prompt!r} continued by {type(model).__name__}:")
        print(tokenizer.decode(output[0], skip_special_tokens=True))
    leaked = sorted(name for name in sys.modules if name.partition(".")[0] == "forgather")
    if leaked:
        print(f"error: the export needed {leaked}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
