"""The alignment of look-back in one pass over the tokens, for the processor, compiled by Numba.

It computes what [`~midimamba.modeling.look_back.LookBack`] defines with torch.
"""

from typing import Any

from .numba_common import kernel


@kernel
def align_(
    ids: Any,
    begins: Any,
    opens_bar: Any,
    position: Any,
    lags: Any,
    all_ids: Any,
    all_places: Any,
    request: Any,
    followers: Any,
    found: Any,
    repeated: Any,
    past: int,
    tokens: tuple[int, int, int],
    apart: int,
    places: int,
    per_position: int,
) -> None:
    """
    Write ids and places of the next tokens behind those of earlier ones, and what they look at.

    Args:
        ids (`array` of shape `(batch, time)`): the next tokens.
        begins (`array` of shape `(batch, time)`): 1 where a document begins.
        opens_bar, position (`array` of shape `(known,)`): of every id, whether it opens a bar, and the last position
            that it sets or -1. What the last entry says holds for all higher ids.
        lags (`array` of shape `(lags,)`): in bars; negative ones look ahead.
        all_ids, all_places (`array` of shape `(batch, at least past + time)`): of all tokens; those of the next are
            written.
        request (`array` of shape `(batch, 3)`): see [`~midimamba.modeling.layer_states.LookBackState`]; updated.
        followers (`array` of shape `(batch, time, lags)`): receives the ids that followed the aligned places, or 0.
        found, repeated (`array` of shape `(batch, time, lags)`): receive 1 where something is aligned, and where it
            is the same token at the same place; 0 elsewhere.
        past (`int`): tokens before these.
        tokens (`tuple[int, int, int]`): begin-of-sequence, gap and fill, or -1.
        apart (`int`): more bars than a lag.
        places, per_position (`int`): the places of a bar, and of a position in it.
    """
    batch, time = ids.shape
    bos, gap, fill = tokens
    for b in range(batch):
        latest = all_places[b, past - 1] if past else places
        number, within = latest // places, latest % places
        gaps, after, jump = request[b]
        for t in range(time):
            token = ids[b, t]
            known = min(token, len(position) - 1)
            starts = begins[b, t] or token == bos
            if starts:
                gaps = jump = 0
            if starts or token == gap:
                number = number // 2 * 2 + 2 * apart + 1
                within = 0
            elif opens_bar[known] or position[known] >= 0:
                within = 0
            else:
                within = within // per_position * per_position + min(within % per_position + 1, per_position - 1)
            if opens_bar[known]:
                number = number + 2 if number % 2 == 0 else number // 2 * 2 + 2 * apart + 2
            if position[known] >= 0:
                within = (position[known] + 1) * per_position
            if token in (gap, fill):
                following = number // 2 + 1 + number % 2 * apart
                before = all_ids[b, past + t - 1] if past + t else bos
                jump = jump + 1 if token == fill and before == fill else following - after + gaps - 2
                if token == gap:
                    gaps += 1
                    if gaps == 1:
                        after = following
                if token == gap or gaps <= 2:
                    jump = 0
            now = past + t
            place = number * places + within
            all_ids[b, now], all_places[b, now] = token, place
            for index in range(len(lags)):
                followers[b, t, index] = 0
                found[b, t, index] = repeated[b, t, index] = 0
                wanted = place - 2 * places * lags[index]
                if lags[index] < 0:
                    wanted -= 2 * places * jump
                    if jump == 0 or wanted < 2 * places * after:
                        continue
                if number % 2:
                    continue
                low, high = 0, now + 1  # the first token behind the wanted place lies in between
                while low < high:
                    middle = (low + high) // 2
                    if all_places[b, middle] <= wanted:
                        low = middle + 1
                    else:
                        high = middle
                if low and all_places[b, low - 1] // places == wanted // places:
                    followers[b, t, index], found[b, t, index] = all_ids[b, low], 1
                    if all_places[b, low - 1] == wanted and all_ids[b, low - 1] == token:
                        repeated[b, t, index] = 1
        request[b, 0], request[b, 1], request[b, 2] = gaps, after, jump


__all__ = ["align_"]
