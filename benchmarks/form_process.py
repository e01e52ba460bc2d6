"""Tunes with a form, drawn from a process whose likelihood is known exactly.

A tune has a key and a form, both hidden. It consists of sections of equal length, which the form names: AABA has two
sections, of which the first comes three times. The notes of a new section come from a Markov chain over the degrees
of a scale, in the key. In a section that repeats, each note is a copy of the note at the same place of the latest
section with the same letter, except that it comes from the chain with a small probability. At last, any token is drawn
from the whole vocabulary with a probability that is smaller still, so that every sequence has a positive probability.

The likelihood of a sequence is a sum over all keys and forms, and costs a few array operations.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

BOS, BAR = range(2)
FIRST_NOTE = 2
# Rows whose likelihood is computed at once: 30 MB with the default sizes.
_ROWS = 512


@dataclass(frozen=True)
class FormProcess:
    """
    The process, and its sizes. All sequences have one length.

    Args:
        forms (`tuple[str, ...]`, *optional*): the forms, equally likely. All have the same number of sections.
        section_bars (`int`, *optional*, defaults to 4): bars of a section.
        bar_notes (`int`, *optional*, defaults to 4): notes of a bar.
        pitches (`int`, *optional*, defaults to 12): pitches of an octave. There are as many keys, equally likely.
        scale (`tuple[int, ...]`, *optional*, defaults to the major scale): the pitches of the scale, above the tonic.
        change (`float`, *optional*, defaults to 0.05): the probability that a note of a repeated section comes from
            the chain.
        noise (`float`, *optional*, defaults to 0.002): the probability that a token is drawn from the whole
            vocabulary.
        spread (`float`, *optional*, defaults to 0.3): concentration of the Dirichlet distribution that the rows of the
            chain are drawn from; the lower, the more predictable are the notes.
        seed (`int`, *optional*, defaults to 0): of the chain.
    """

    forms: tuple[str, ...] = ("AABB", "AABA", "ABAB", "ABAC")
    section_bars: int = 4
    bar_notes: int = 4
    pitches: int = 12
    scale: tuple[int, ...] = (0, 2, 4, 5, 7, 9, 11)
    change: float = 0.05
    noise: float = 0.002
    spread: float = 0.3
    seed: int = 0

    @property
    def vocab_size(self) -> int:
        """Start, bar line, and a token per pitch."""
        return FIRST_NOTE + self.pitches

    @property
    def length(self) -> int:
        """Tokens of a tune, with the start token, which is given and never scored."""
        return 1 + len(self.forms[0]) * self.section_tokens

    @property
    def section_tokens(self) -> int:
        """Tokens of a section."""
        return self.section_bars * (1 + self.bar_notes)

    @cached_property
    def chain(self) -> Tensor:
        """Probabilities `(keys, vocab, vocab)` of a note, given the key and the note before it. After a token that is
        not in the key, the chain starts again."""
        degrees = torch.tensor(self.scale)
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            rows = torch.distributions.Dirichlet(torch.full((len(degrees),), self.spread, dtype=torch.float64))
            start, steps = rows.sample(), rows.sample((len(degrees),))
        chain = torch.zeros(self.pitches, self.vocab_size, self.vocab_size, dtype=torch.float64)
        for key in range(self.pitches):
            notes = FIRST_NOTE + (key + degrees) % self.pitches
            chain[key, :, notes] = start
            chain[key, notes[:, None], notes] = steps
        return chain

    @cached_property
    def sources(self) -> Tensor:
        """The place `(forms, length)` that each place repeats, or -1."""
        sources = torch.full((len(self.forms), self.length), -1)
        for row, form in zip(sources, self.forms, strict=True):
            for section, letter in enumerate(form):
                earlier = form.rfind(letter, 0, section)
                if earlier >= 0:
                    start = 1 + section * self.section_tokens
                    places = torch.arange(start, start + self.section_tokens)
                    row[places] = places - (section - earlier) * self.section_tokens
        return sources

    @cached_property
    def is_bar(self) -> Tensor:
        """Whether a bar line belongs at each place, shape `(length,)`."""
        places = torch.arange(self.length) - 1
        return (places >= 0) & (places % (1 + self.bar_notes) == 0)

    @cached_property
    def before(self) -> Tensor:
        """The place `(length,)` of the note before each place; the start token is before the first."""
        is_note = ~self.is_bar
        last = (torch.arange(self.length) * is_note).cummax(0).values
        return torch.cat([last.new_zeros(1), last[:-1]])

    def log_likelihood(self, ids: Tensor) -> Tensor:
        """
        Exact log-likelihood of sequences, in nats.

        Args:
            ids (`LongTensor` of shape `(n, length)`): sequences with the start token.

        Returns:
            `Tensor` of shape `(n,)`, in double precision, on the CPU.
        """
        return torch.cat([self._log_likelihood(rows) for rows in ids.cpu().split(_ROWS)])

    def _log_likelihood(self, ids: Tensor) -> Tensor:
        drawn = self.chain[:, ids[:, self.before[1:]], ids[:, 1:]]  # (keys, n, length - 1)
        is_bar, bar_line = self.is_bar[1:], (ids[:, 1:] == BAR).double()
        hidden = []
        for source in self.sources[:, 1:]:
            copied = (ids[:, 1:] == ids[:, source.clamp(min=0)]).double()
            repeated = torch.where(source >= 0, self._mix(copied, drawn, self.change), drawn)
            meant = torch.where(is_bar, bar_line, repeated)
            hidden.append(self._mix(meant, torch.full_like(meant, 1 / self.vocab_size), self.noise).log().sum(-1))
        logs = torch.stack(hidden).flatten(0, 1)
        return logs.logsumexp(0) - torch.tensor(float(len(logs)), dtype=torch.float64).log()

    @staticmethod
    def _mix(usual: Tensor, rare: Tensor, share: float) -> Tensor:
        return (1 - share) * usual + share * rare

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Tunes `(count, length)`, drawn with the generator's random numbers."""
        keys = torch.randint(self.pitches, (count,), generator=generator)
        sources = self.sources[torch.randint(len(self.forms), (count,), generator=generator)]
        rows = torch.arange(count)
        ids = torch.full((count, self.length), BOS)
        for place in range(1, self.length):
            source = sources[:, place]
            drawn = torch.multinomial(self.chain[keys, ids[:, self.before[place]]], 1, generator=generator)[:, 0]
            changes, is_noise = torch.rand(2, count, generator=generator) < torch.tensor([[self.change], [self.noise]])
            meant = torch.where((source >= 0) & ~changes, ids[rows, source.clamp(min=0)], drawn)
            if self.is_bar[place]:
                meant = torch.full_like(meant, BAR)
            anything = torch.randint(self.vocab_size, (count,), generator=generator)
            ids[:, place] = torch.where(is_noise, anything, meant)
        return ids

    def transpose(self, ids: Tensor, steps: int) -> Tensor:
        """The same tunes `(n, length)` in another key, which is as likely."""
        raised = FIRST_NOTE + (ids - FIRST_NOTE + steps) % self.pitches
        return torch.where(ids >= FIRST_NOTE, raised, ids)

    def has_form(self, ids: Tensor, agreement: float = 0.75) -> Tensor:
        """Whether sequences `(n, length)` have one of the forms: each section that repeats agrees with its source in
        at least this share of its tokens. Shape `(n,)`."""
        found = torch.zeros(len(ids), dtype=torch.bool)
        for source in self.sources:
            same = (ids == ids[:, source.clamp(min=0)])[:, 1:].unflatten(1, (-1, self.section_tokens))
            repeats = (source[1:] >= 0).unflatten(0, (-1, self.section_tokens))[:, 0]
            found |= ((same.double().mean(-1) >= agreement) | ~repeats).all(1)
        return found
