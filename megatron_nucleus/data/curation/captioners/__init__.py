"""Machines that write captions, behind one protocol.

`protocol` says what a captioner is, `prompts` what it is asked, `settings` which one runs and within which limits.
Built in are `openai_http` (any server that speaks OpenAI's chat interface) and `vision_language` (a model of the
transformers library in this process). `desk` stands between them and the stage: it keeps answers that were paid for
and counts what they cost, in the `ledger`.
"""
