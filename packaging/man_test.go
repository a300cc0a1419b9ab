package packaging

import (
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"xapi-nbd/internal/manpages"
)

// xapi-nbd-firewall(8) names all that the script takes and every exit code.
func TestFirewallManPage(t *testing.T) {
	manpages.Lint(t, ".", "xapi-nbd-firewall.8")
	text, err := os.ReadFile("xapi-nbd-firewall.8")
	if err != nil {
		t.Fatal(err)
	}
	page := strings.ReplaceAll(string(text), `\-`, "-")
	usage := newFakes(t).firewall().stderr
	words := regexp.MustCompile(`[a-z-]*[a-z]`).FindAllString(usage[strings.Index(usage, "["):], -1)
	if len(words) < 8 {
		t.Errorf("found the words %q in %q, want at least 8", words, usage)
	}
	for _, word := range words {
		if !strings.Contains(page, word) {
			t.Errorf("the page lacks %s", word)
		}
	}
	script, err := os.ReadFile("xapi-nbd-firewall")
	if err != nil {
		t.Fatal(err)
	}
	_, status, _ := strings.Cut(page, ".SH EXIT STATUS\n")
	status, _, _ = strings.Cut(status, ".SH ")
	for _, m := range append(regexp.MustCompile(`\bexit (\d)`).FindAllStringSubmatch(string(script), -1), []string{"", "0"}) {
		if !strings.Contains(status, ".TP\n.B "+m[1]+"\n") {
			t.Errorf("EXIT STATUS lacks %s", m[1])
		}
	}
}

// checkManPages reads the pages below a folder in which a package was unpacked:
// their dates are that of the package, and the version is its version.
func checkManPages(t *testing.T, root string) {
	t.Helper()
	pages, err := filepath.Glob(filepath.Join(root, "usr/share/man/man*/*.gz"))
	if err != nil || len(pages) < 10 {
		t.Fatalf("found the pages %q (%v), want at least 10", pages, err)
	}
	title := regexp.MustCompile(`(?m)^\.TH "[A-Z.\\-]+" "[158]" "(.*?)" "(?:xapi|nbd)\\-(?:nbd|tool) (.*?)" "NBD"$`)
	for _, path := range pages {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		want := []string{info.ModTime().UTC().Format("2006-01-02"), version(t)}
		m := title.FindStringSubmatch(gunzip(t, path))
		if m == nil || m[1] != want[0] || m[2] != want[1] {
			t.Errorf("%s: got title %q, want date and version %q", path, m, want)
		}
	}
}

func gunzip(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
