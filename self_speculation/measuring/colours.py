"""Colours that stay apart for colour-blind readers, those of Okabe and Ito, and in grey by the markers beside them."""

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, BLACK, GREY = "#56B4E9", "#CC79A7", "#000000", "#7F7F7F"
# For lines, in this order.
LINES = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def line_style(index: int) -> dict[str, str]:
    """A line's colour and marker, which differ from those of the lines before it as long as there are enough."""
    return {"color": LINES[index % len(LINES)], "marker": MARKERS[index % len(MARKERS)]}
