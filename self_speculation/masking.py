"""Secrets in arguments, and how they are kept out of files of results and of what is printed."""

import re

MASK = "***"
# `token=…`, `use_auth_token=…`, `api_key: …`, but not `pad_token=…`, with quotes around the value or without.
NAMED_SECRET = re.compile(
    r"""(?ix) (?<!\w) (?! (?:bos|eos|pad|unk|sep|cls|mask)_token )
    (?P<name> [\w-]* (?:token|api[_-]?key|password|passwd|secret) ['"]? \s* [=:] \s* )
    (?P<value> '[^']*' | "[^"]*" | [^\s,'"}]+ )"""
)
# What a token of the hub looks like, and who logs in where in an address.
LOOKS_SECRET = re.compile(r"(?<!\w)hf_\w+|(?<=://)[^/@\s]+(?=@)")


def masked(text: str) -> str:
    """The text with a mask in the place of everything that looks like a secret."""
    return LOOKS_SECRET.sub(MASK, NAMED_SECRET.sub(rf"\g<name>{MASK}", text))


def without_secrets_of(arguments: str, text: str) -> str:
    """The text with a mask in the place of whatever the arguments name as a secret, wherever it stands."""
    for match in NAMED_SECRET.finditer(arguments):
        text = text.replace(match["value"].strip("'\""), MASK)
    return masked(text)
