package text

import (
	"slices"
	"testing"
)

func TestWrap(t *testing.T) {
	got := Wrap("one two\nthree \x1b[31mfour fourteenletters", 9)
	want := []string{"one two", "three", "[31mfour", "fourteenletters"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := Wrap("", 9); len(got) != 1 {
		t.Errorf("nothing: got %q, want one line", got)
	}
}

func TestOneLine(t *testing.T) {
	if got := OneLine("a\x1b[2J\nb\u009bc  d"); got != "a [2J b c d" {
		t.Errorf("control characters: got %q", got)
	}
}
