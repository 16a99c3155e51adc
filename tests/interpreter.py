"""Triton's interpreter, in less time."""

import functools


def patch_language_once(patch):
    """The interpreter replaces what ``triton.language`` holds at every call of a device function; here, where it is not yet."""
    import triton.language as tl
    from triton.runtime import interpreter

    whole = interpreter._patch_lang

    @functools.cache
    def languages(function):
        return [
            language for language in (tl, tl.core) if any(value is language for value in function.__globals__.values())
        ]

    def once(function):
        found = languages(function)
        if found and not any(tl.core.is_builtin(language.load) for language in found):
            return interpreter._LangPatchScope()
        return whole(function)

    patch.setattr(interpreter, "_patch_lang", once)
