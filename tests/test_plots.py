"""Pictures: what is drawn where, labels in any script, and that nothing global is touched."""

import warnings

import pytest
import torch

from hf_rnn import extras, plot_attention, plot_confusion, plot_gates, plot_pooling, plot_states
from hf_rnn.plots.states import Place, lay_out
from matrix import make_model, make_tokens


matplotlib = pytest.importorskip("matplotlib")
DEJAVU = matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf"
CARIAN = "\U000102a0\U000102a1"  # a script that hardly any machine has a font for


@pytest.fixture(autouse=True)
def nothing_global():
    """Neither the figures of pyplot nor the settings of matplotlib are touched."""
    from matplotlib._pylab_helpers import Gcf

    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before
    assert not Gcf.figs


def draw(figure):
    """Draws as saving does; a warning of a missing glyph would be an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.canvas.draw()
    return figure


def labels_of(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_heads_stand_side_by_side():
    """A heat map for each head with its weights, source tokens as columns and target tokens as rows."""
    source, target = ["Ich", "$x_1$", " ", "</s>"], ["\n", "I", "</s>"]
    weights = torch.softmax(torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), -1)
    figure = draw(plot_attention(weights, source, target, title="$a", heads=["left", "right"]))
    first, second, _ = figure.axes
    for axes, matrix in zip((first, second), weights):
        torch.testing.assert_close(torch.tensor(axes.images[0].get_array()), matrix.double())
        assert axes.images[0].get_clim() == (0, 1)
        assert labels_of(axes.xaxis) == ["Ich", "$x_1$", "␣", "</s>"]
    assert labels_of(first.yaxis) == ["↵", "I", "</s>"]
    assert [axes.get_xlabel() for axes in (first, second)] == ["left", "right"]
    assert figure.get_suptitle() == "$a"


def test_attention_of_a_model():
    """What a model returns goes in as it is, in half precision and with gradients too; large pictures keep a size."""
    model = make_model("RNNSeq2SeqModel", num_attention_heads=2, dtype=torch.bfloat16)
    tokens = make_tokens(1, 7)
    outputs = model(tokens, decoder_input_ids=tokens[:, :3], output_attentions=True)
    figure = draw(plot_attention(outputs.cross_attentions[-1][0], list("abcdefg"), list("xyz")))
    assert [axes.get_xlabel() for axes in figure.axes[:2]] == ["head 1", "head 2"]
    many = [f"token {index}" for index in range(150)]
    long = plot_attention(torch.full((150, 150), 1 / 150), many, many)
    assert max(long.get_size_inches()) < 20
    assert min(plot_attention([[1.0]], ["a"], ["b"]).get_size_inches()) > 1


def boxes_of(axes):
    """For each coloured box its left edge, top edge and colour."""
    (boxes,) = axes.collections
    corners = [tuple(path.vertices.min(0)) for path in boxes.get_paths()]
    return list(zip(corners, boxes.get_facecolors()))


def test_states_colour_the_text():
    """Each character stands on the colour of its number: blue above zero, red below; lines end where they should."""
    figure = draw(plot_states("ab c\ndef", [1.0, -1, 0, 1, -1, 0, 0.5, 1], columns=10, names=["unit 3"]))
    axes = figure.axes[0]
    written = {(text.get_position(), text.get_text()) for text in axes.texts}
    assert ((0.5, 0.5), "a") in written
    assert ((4.5, 0.5), "↵") in written
    assert ((2.5, 1.5), "f") in written
    assert len(written) == 7  # the space is a colour alone
    boxes = boxes_of(axes)
    assert [corner for corner, _ in boxes] == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (0, 1), (1, 1), (2, 1)]
    for (_, (red, _, blue, _)), state in zip(boxes, [1.0, -1, 0, 1, -1, 0, 0.5, 1]):
        assert (blue > red + 0.1) == (state > 0)
        assert (red > blue + 0.1) == (state < 0)
    assert axes.get_title(loc="left") == "unit 3"
    two = draw(plot_states(["to", "ken"], [[0.1, 0.2], [0.3, -0.4]], limit=1))
    assert len([axes for axes in two.axes if axes.collections and axes.texts]) == 2


def test_pooling_colours_words():
    """Each word stands on the colour of its weight; heads repeat the text, padding is left out, lines go on."""
    words = ["the", "$x$", " ", "good"]
    figure = draw(plot_pooling([0.1, 0.2, 0.0, 0.7], words, names=["positive"], title="$t"))
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["the", "$x$", "␣", "good"]
    assert axes.get_title(loc="left") == "positive"
    assert figure.get_suptitle() == "$t"
    boxes = boxes_of(axes)
    brightness = [float(color[:3].sum()) for _, color in boxes]
    assert sorted(brightness, reverse=True) == [brightness[index] for index in (2, 0, 1, 3)]
    lefts = [corner[0] for corner, _ in boxes]
    assert lefts == sorted(lefts)
    for text, (left, _), after in zip(axes.texts, (corner for corner, _ in boxes), [*lefts[1:], 99]):
        assert left < text.get_position()[0] < after

    model = make_model("RNNForSequenceClassification", pooling="attention", pooling_heads=2, dtype=torch.bfloat16)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    weights = model(make_tokens(2, 7), mask, output_attentions=True).attentions[0]
    texts = [["word"] * 7, ["日本", "語", "ab", "c"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = plot_pooling(weights, texts, columns=20, names=["first", "second"])
    panels = [axes for axes in figure.axes if axes.collections and axes.texts]
    titles = [axes.get_title(loc="left") for axes in panels]
    assert titles == ["first, head 1", "first, head 2", "second, head 1", "second, head 2"]
    assert [len(axes.texts) for axes in panels] == [7, 7, 4, 4]
    assert {corner[1] for corner, _ in boxes_of(panels[0])} == {0.06, 1.06, 2.06}


def test_confusion_of_classes():
    """Rows are classes, colours shares of them, numbers counts; of many those with the most errors are shown."""
    counts = [[8, 2, 0], [0, 5, 0], [1, 0, 0]]
    figure = draw(plot_confusion(counts, ["$a", "b", " "], title="t"))
    axes = figure.axes[0]
    shares = torch.tensor([[0.8, 0.2, 0], [0, 1, 0], [1, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(axes.images[0].get_array()), shares)
    assert labels_of(axes.yaxis) == labels_of(axes.xaxis) == ["$a", "b", "␣"]
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {
        ((0, 0), "8"),
        ((1, 0), "2"),
        ((1, 1), "5"),
        ((0, 2), "1"),
    }
    many = torch.eye(50, dtype=torch.long) * 10
    many[3, 7] = 5
    many[40, 3] = 2
    axes = draw(plot_confusion(many, [f"class {index}" for index in range(50)], most=2)).axes[0]
    assert labels_of(axes.yaxis) == ["class 3", "class 7", "48 others"]
    expected = torch.tensor([[10, 5, 0], [0, 10, 0], [2, 0, 480]], dtype=torch.float64)
    torch.testing.assert_close(
        torch.tensor(axes.images[0].get_array()), expected / expected.sum(1, keepdim=True), rtol=1e-9, atol=0
    )
    large = draw(plot_confusion(torch.zeros(150, 150), [f"class {index}" for index in range(150)]))
    assert not large.axes[0].texts
    assert max(large.get_size_inches()) < 20


def test_layout_of_scripts():
    """Wide letters take two columns, marks none of their own; right-to-left lines are mirrored; tokens stay whole."""
    assert lay_out("日a", 10) == [Place(0, 0, 2), Place(0, 2, 1)]
    assert lay_out(["e\u0301", "b"], 10) == [Place(0, 0, 1), Place(0, 1, 1)]
    assert lay_out("אב\nabc", 10) == [Place(0, 2, 1), Place(0, 1, 1), Place(0, 0, 1)] + [
        Place(1, column, 1) for column in range(3)
    ]
    assert lay_out(["abc", "def", "g"], 5) == [Place(0, 0, 3), Place(1, 0, 3), Place(1, 3, 1)]


def test_gates_of_a_model():
    """A line for each gate, of the units asked for or the mean of all; padding is the caller's to leave out."""
    model = make_model("RNNModel", bidirectional=True)
    gates = {name: values[0] for name, values in model(make_tokens(1, 5), output_gates=True).gates[0].items()}
    figure = draw(plot_gates(gates, list("abc d"), units=[4, 0], title="two units"))
    for axes, unit in zip(figure.axes, (4, 0)):
        lines = {
            line.get_label(): torch.tensor(line.get_ydata()) for line in axes.get_lines() if len(line.get_xdata()) > 2
        }
        assert lines.keys() == gates.keys()
        for name, values in lines.items():
            torch.testing.assert_close(values, gates[name][:, unit].detach())
    mean = draw(plot_gates(gates, list("abc d"))).axes[0]
    assert labels_of(mean.xaxis) == ["a", "b", "c", "␣", "d"]
    torch.testing.assert_close(torch.tensor(mean.get_lines()[0].get_ydata()), gates["input"].mean(1).detach())


def make_font(path, family: str, characters: str) -> str:
    """A font file with squares for some characters."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    for index, point in enumerate([(100, 0), (100, 700), (800, 700), (800, 0)]):
        (pen.lineTo if index else pen.moveTo)(point)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(character): "square" for character in characters})
    builder.setupGlyf({".notdef": square, "square": square})
    builder.setupHorizontalMetrics({".notdef": (900, 100), "square": (900, 100)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    builder.save(path)
    return str(path)


def test_fonts():
    """Families and files can be chosen; what no font has is warned of by name, and what is not there refused."""
    for font in ("DejaVu Serif", ["DejaVu Serif", "DejaVu Sans"], DEJAVU):
        draw(plot_attention([[1.0]], ["Ж"], ["é"], font=font))
    with pytest.warns(UserWarning, match="No DejaVuSans.ttf has 日 - boxes"):
        plot_attention([[1.0]], ["日"], ["é"], font=DEJAVU)
    with pytest.warns(UserWarning, match="No DejaVu Serif has 日"):
        plot_states("日", [1.0], font="DejaVu Serif")
    for font in ("No Such Family", "/no/such/file.ttf", ["DejaVu Sans", "No Such Family"]):
        with pytest.raises(ValueError, match=r"`font` must be an installed family or a font file, got .*o.[Ss]uch"):
            plot_attention([[1.0]], ["a"], ["b"], font=font)


def test_missing_glyphs_by_default(monkeypatch, tmp_path):
    """Installed fonts are looked through; where none has a character, a warning says what to do."""
    from matplotlib import font_manager

    fonts = [entry for entry in font_manager.fontManager.ttflist if entry.name.startswith("DejaVu")]
    # Newer versions of matplotlib count a font in that has a box for everything.
    boxes = make_font(tmp_path / "boxes.ttf", "Last Resort High-Efficiency", CARIAN)
    fonts.append(font_manager.ttfFontProperty(font_manager.get_font(boxes)))
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    with pytest.warns(UserWarning, match="No installed font has 𐊠 𐊡 - boxes .* Install a font"):
        plot_gates({"input": torch.zeros(2, 3)}, list(CARIAN))


@pytest.mark.parametrize("font", [None, "Zeta Carian"])
def test_fonts_installed_since(font, monkeypatch, tmp_path):
    """Matplotlib keeps a list of fonts; one that was installed after it was made is found none the less."""
    from matplotlib import font_manager

    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    paths = [str(tmp_path / "broken.ttf"), make_font(tmp_path / "carian.ttf", "Zeta Carian", CARIAN)]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: paths)
    figure = draw(plot_states(CARIAN, [0.0, 1.0], font=font))
    written = [text for axes in figure.axes for text in axes.texts if text.get_text() in CARIAN]
    assert len(written) == len(CARIAN)
    for text in written:
        assert "Zeta Carian" in text.get_fontproperties().get_family()


def test_refusals():
    square = torch.full((2, 2), 0.5)
    for call, message in (
        (lambda: plot_attention(square, ["a"], ["b", "c"]), "2 target tokens, 1 source"),
        (lambda: plot_attention(square[None, None], ["a", "b"], ["b", "c"]), "`attention` must have 2 or 3 dim"),
        (lambda: plot_attention(square * 4, ["a", "b"], ["b", "c"]), "between 0 and 1, got 2 to 2"),
        (lambda: plot_attention(square * torch.nan, ["a", "b"], ["b", "c"]), "finite"),
        (lambda: plot_attention(square, ["a", "b"], ["b", "c"], heads=["x", "y"]), "`heads` must be 1 names, got 2"),
        (lambda: plot_states("abc", square), r"\(\[units,\] 3 tokens\), got \(2, 2\)"),
        (lambda: plot_states("", []), "`states` must have the shape"),
        (lambda: plot_states([0.5, 0.5], "ab"), "`states` must be a tensor or nested lists of numbers"),
        (lambda: plot_states("ab", square, names=["a"]), "`names` must be 2 names"),
        (lambda: plot_states("ab", square, columns=0), "`columns` must be at least 1, got 0"),
        (lambda: plot_states("ab", square, limit=0.0), "`limit` must be positive, got 0.0"),
        (lambda: plot_pooling([0.5, 0.5], ["a", "b", "c"]), r"at least 3 words\), got \(1, 2\) for 3 words"),
        (lambda: plot_pooling(square[None, None], [["a", "b"]]), r"`attention\[0\]` must have the shape"),
        (lambda: plot_pooling([2.0], ["a"]), "between 0 and 1, got 2 to 2"),
        (lambda: plot_pooling([], []), "at least one text, got none"),
        (lambda: plot_pooling([[0.5]], [["a"], ["b"]]), "weights of 2 texts, got 1"),
        (lambda: plot_pooling([0.5], ["a"], names=["x", "y"]), "`names` must be 1 names, got 2"),
        (lambda: plot_pooling([0.5], ["a"], columns=0), "`columns` must be at least 1, got 0"),
        (lambda: plot_pooling([0.5], ["a"], limit=-1.0), "`limit` must be positive, got -1.0"),
        (lambda: plot_confusion(square, ["a", "b"]), "whole numbers of at least 0"),
        (lambda: plot_confusion(square.round() - 1, ["a", "b"]), "whole numbers of at least 0"),
        (lambda: plot_confusion([[1, 2]], ["a", "b"]), r"each of 2 labels, got the shape \(1, 2\)"),
        (lambda: plot_confusion([[1]], ["a"], most=0), "`most` must be at least 1, got 0"),
        (lambda: plot_gates({}, "ab"), "at least one gate"),
        (lambda: plot_gates({"input": square}, "abc"), r"`gates\['input'\]` must have the shape \(3 tokens"),
        (lambda: plot_gates({"input": square}, "ab", units=[2]), "`units` must be between 0 and 1, got 2"),
        (lambda: plot_gates({"input": square}, "ab", units=[]), "at least one unit"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_without_matplotlib(monkeypatch):
    """The error names the extra; importing needs nothing."""
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    for call in (
        lambda: plot_attention([[1.0]], ["a"], ["b"]),
        lambda: plot_states("a", [1.0]),
        lambda: plot_gates({"input": [[1.0]]}, "a"),
        lambda: plot_pooling([1.0], ["a"]),
        lambda: plot_confusion([[1]], ["a"]),
    ):
        with pytest.raises(ImportError, match=r"pip install 'hf_rnn\[plots\]'"):
            call()
