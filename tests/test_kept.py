from fluidscale.kept import Kept


def test_a_name_is_computed_once_and_the_oldest_is_forgotten():
    kept, computed = Kept(2), []

    def ask(name):
        return kept(name, lambda: computed.append(name) or name.upper())

    assert [ask(name) for name in "abab"] == ["A", "B", "A", "B"] and computed == ["a", "b"]
    assert [ask(name) for name in "cba"] == ["C", "B", "A"] and computed == ["a", "b", "c", "a"]


def test_what_is_weighed_fits_together_and_what_never_would_is_not_kept():
    kept, computed = Kept(5, weigh=len), []

    def ask(name):
        return kept(name, lambda: computed.append(name) or name)

    for name in ("aa", "bbb", "aa", "bbb"):
        assert ask(name) == name
    assert computed == ["aa", "bbb"]
    assert [ask("ccc"), ask("bbb"), ask("ccc")] == ["ccc", "bbb", "ccc"] and computed[2:] == ["ccc", "bbb", "ccc"]
    assert [ask("dddddd"), ask("dddddd"), ask("ccc")] == ["dddddd"] * 2 + ["ccc"] and computed[5:] == ["dddddd"] * 2
