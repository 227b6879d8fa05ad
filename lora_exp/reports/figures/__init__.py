"""The charts of a sweep as Plotly figures: plain dictionaries, so that drawing needs the library in the page alone.

Line and dot colours are of middle lightness, to be read on white paper and on a dark screen. All other colours
come from the page's style sheet, which follows the reader's preference and the printer.
"""
