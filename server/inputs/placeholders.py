"""The one rule for what a picture becomes in the prompt, as token ids and never as text.

A tile is FAKE, n image tokens, FAKE; neighbours share a FAKE. One picture whole is 66 ids at n = 64, split in four
plus the whole 326; m pictures in a row share theirs too: 64m + m + 1, or 320m + 5m + 1 (model card of idefics2-8b).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from server.types import PlaceholderRange


@dataclass
class PromptIds:
    """A prompt under construction: ids so far, and where tiles stand among them."""

    fake_token_id: int
    image_token_id: int
    rows_per_tile: int
    token_ids: list[int] = field(default_factory=list)
    placeholders: list[PlaceholderRange] = field(default_factory=list)

    @property
    def ends_with_image(self) -> bool:
        return bool(self.token_ids) and self.token_ids[-1] == self.fake_token_id

    def add_ids(self, token_ids: list[int]) -> None:
        self.token_ids += token_ids

    def add_tiles(self, count: int) -> None:
        """Append one picture of `count` tiles."""
        if not self.ends_with_image:
            self.token_ids.append(self.fake_token_id)
        for _ in range(count):
            self.placeholders.append(PlaceholderRange(len(self.token_ids), self.rows_per_tile))
            self.token_ids += [self.image_token_id] * self.rows_per_tile
            self.token_ids.append(self.fake_token_id)
