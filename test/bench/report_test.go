package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestReplaceMarked(t *testing.T) {
	const document = "# Title\n\nby hand\n\n" + beginMark + "\nold\n" + endMark + "\n\nby hand too\n"
	got, err := replaceMarked(document, "new\n\n")
	if want := strings.Replace(document, "old", "new", 1); err != nil || got != want {
		t.Errorf("got %q, error %v, want %q", got, err, want)
	}
	if again, err := replaceMarked(got, "new"); err != nil || again != got {
		t.Errorf("a second time: got %q, error %v", again, err)
	}
	for name, text := range map[string]string{
		"no marks":    "# Title\n",
		"no end":      beginMark + "\n",
		"no begin":    endMark + "\n",
		"end first":   endMark + "\n" + beginMark + "\n",
		"two begins":  beginMark + "\n" + beginMark + "\n" + endMark,
		"two of both": beginMark + endMark + beginMark + endMark,
	} {
		if got, err := replaceMarked(text, "new"); err == nil {
			t.Errorf("%s: got %q, want an error", name, got)
		}
	}
}

func TestSpliceMarkdown(t *testing.T) {
	path := filepath.Join(t.TempDir(), "doc.md")
	got, err := spliceMarkdown(path, "new")
	if err != nil || !strings.Contains(got, beginMark+"\nnew\n"+endMark) || !strings.HasPrefix(got, "# ") {
		t.Errorf("no file yet: got %q, error %v", got, err)
	}
	if err := os.WriteFile(path, []byte("not ours\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := spliceMarkdown(path, "new"); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a file without marks: got error %v, want one that names it", err)
	}
}

// TestNothingRunsForABadDocument: that the file has no marks is said before the
// work, not after it.
func TestNothingRunsForABadDocument(t *testing.T) {
	path := filepath.Join(t.TempDir(), "doc.md")
	if err := os.WriteFile(path, []byte("not ours\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var out, errOut strings.Builder
	err := run(t.Context(), []string{"-quick", "-run", "^cache$", "-tool", "/no/such/tool", "-o", path}, streams{nil, &out, &errOut})
	if err == nil || !strings.Contains(err.Error(), beginMark) || errOut.Len()+out.Len() > 0 {
		t.Errorf("got error %v, output %q and %q", err, out.String(), errOut.String())
	}
}

func TestOptions(t *testing.T) {
	tests := []struct {
		name string
		args []string
		want string
	}{
		{"expression", []string{"-run", "("}, "-run"},
		{"no case", []string{"-run", "^nothing$"}, "no case matches"},
		{"rounds", []string{"-rounds", "0"}, "at least one round"},
		{"size", []string{"-size", "1"}, "16 MiB"},
		{"argument", []string{"bulk"}, "no flags"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out strings.Builder
			if err := run(t.Context(), tt.args, streams{nil, &out, &out}); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got error %v, want one with %q", err, tt.want)
			}
		})
	}
	var out strings.Builder
	if err := run(t.Context(), []string{"-list", "-run", "^zeros/.*/2m"}, streams{nil, &out, &out}); err != nil {
		t.Fatal(err)
	}
	if got, want := out.String(), "zeros/tls/1x16/2m\nzeros/tls/4x64/2m\n"; got != want {
		t.Errorf("-list: got %q, want %q", got, want)
	}
}

// TestTablesFit: 100 columns, with large numbers, several rounds and the longest
// names.
func TestTablesFit(t *testing.T) {
	r := &results{}
	left := 0.5
	for _, c := range allCases() {
		for _, s := range everyServer {
			for round := range 5 {
				r.add(sample{
					Case: c.name, Server: s, Round: round + 1, Bytes: int64(12+round) << 30, Reads: int64(100000 + 7000*round),
					Seconds: 1, CPU: 12.3, Mean: 12345, P50: 12345, P99: 123456, PeakRSS: 123 << 20, RSS: 123 << 20, RSSFresh: 12 << 20,
					Beside: 12345, Resident: &left,
				})
			}
		}
	}
	tables := allTables(r, options{run: regexp.MustCompile("")})
	if len(tables) != 14 {
		t.Errorf("got %d tables, want 14", len(tables))
	}
	for _, tab := range tables {
		var text strings.Builder
		if err := tab.writeText(&text); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(text.String()) {
			if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > 100 {
				t.Errorf("%s: %d columns: %s", tab.title, n, line)
			}
		}
		for _, row := range tab.rows {
			if len(row) != len(tab.head) {
				t.Errorf("%s: %d cells under %d heads: %q", tab.title, len(row), len(tab.head), row)
			}
		}
		if got := strings.Count(tab.markdown(), "|\n"); got != len(tab.rows)+2 {
			t.Errorf("%s: %d lines of Markdown, want %d", tab.title, got, len(tab.rows)+2)
		}
	}
}

func TestQuoted(t *testing.T) {
	if got, want := quoted([]string{"-run", "^a|b's$", "-quick"}), ` -run '^a|b'\''s$' -quick`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
