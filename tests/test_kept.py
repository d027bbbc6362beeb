from fluidscale.kept import Kept


def test_a_name_is_computed_once_and_the_oldest_is_forgotten():
    kept, computed = Kept(2), []

    def ask(name):
        return kept(name, lambda: computed.append(name) or name.upper())

    assert [ask(name) for name in "abab"] == ["A", "B", "A", "B"] and computed == ["a", "b"]
    assert [ask(name) for name in "cba"] == ["C", "B", "A"] and computed == ["a", "b", "c", "a"]
