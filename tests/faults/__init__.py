"""Faults, overload and hostile clients against real servers, with figures: `python -m tests.faults` (`make faults`).

Not collected by pytest: what it shows takes minutes and is measured. Every scenario also fails loudly, by a row whose
figure is out of bounds; the exit status says whether any was.
"""
