package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// events are the output of go test of a successful run.
var events = []string{
	`{"Action":"start","Package":"m/test/a"}`,
	`{"Action":"run","Package":"m/test/a","Test":"TestPeers"}`,
	`{"Action":"run","Package":"m/test/a","Test":"TestPeers/some_client"}`,
	`{"Action":"output","Package":"m/test/a","Test":"TestPeers/some_client","Output":"    x_test.go:1: peer: some client 1.2\n"}`,
	`{"Action":"output","Package":"m/test/a","Test":"TestPeers/some_client","Output":"    x_test.go:1: peer: some client 1.2\n"}`,
	`{"Action":"output","Package":"m/test/a","Test":"TestPeers/some_client","Output":"    x_test.go:2: n/a: some client/clear, EXPORT_NAME/random: copies: all\n"}`,
	`{"Action":"output","Package":"m/test/a","Test":"TestPeers/some_client","Output":"    x_test.go:2: n/a: some client/clear, EXPORT_NAME/death: copies: all\n"}`,
	`{"Action":"output","Package":"m/test/a","Test":"TestPeers/some_client","Output":"    x_test.go:2: n/a: some client/TLS, GO: a|b\n"}`,
	`{"Action":"run","Package":"m/test/a","Test":"TestPeers/some_client/clear,_EXPORT_NAME"}`,
	`{"Action":"run","Package":"m/test/a","Test":"TestPeers/some_client/clear,_EXPORT_NAME/whole_disk"}`,
	`{"Action":"pass","Package":"m/test/a","Test":"TestPeers/some_client/clear,_EXPORT_NAME/whole_disk"}`,
	`{"Action":"run","Package":"m/test/a","Test":"TestPeers/some_client/clear,_EXPORT_NAME/in/parts"}`,
	`{"Action":"pass","Package":"m/test/a","Test":"TestPeers/some_client/clear,_EXPORT_NAME/in/parts"}`,
	`{"Action":"pass","Package":"m/test/a","Test":"TestPeers/some_client/clear,_EXPORT_NAME"}`,
	`{"Action":"pass","Package":"m/test/a","Test":"TestPeers/some_client"}`,
	`{"Action":"pass","Package":"m/test/a","Test":"TestPeers"}`,
	`{"Action":"pass","Package":"m/test/a","Elapsed":2}`,
	`{"Action":"run","Package":"m/b","Test":"TestOldLibrary"}`,
	`{"Action":"output","Package":"m/b","Test":"TestOldLibrary","Output":"=== RUN   TestOldLibrary\n"}`,
	`{"Action":"output","Package":"m/b","Test":"TestOldLibrary","Output":"    b_test.go:7: original library: NOT tested: not installed\n"}`,
	`{"Action":"skip","Package":"m/b","Test":"TestOldLibrary"}`,
	`{"Action":"run","Package":"m/b","Test":"TestDialogues/list.txt"}`,
	`{"Action":"output","Package":"m/b","Test":"TestDialogues/list.txt","Output":"    b_test.go:9: peer: another, as recorded\n"}`,
	`{"Action":"pass","Package":"m/b","Test":"TestDialogues/list.txt"}`,
	`{"Action":"run","Package":"m/b","Test":"TestHelper"}`,
	`{"Action":"pass","Package":"m/b","Test":"TestHelper"}`,
	`{"Action":"pass","Package":"m/b"}`,
}

const table = `
| peer | version |
|---|---|
| some client | 1.2 |
| another, as recorded | – |

### b

| peer | mode | passed | not run, and why |
|---|---|---|---|
| Old Library | – | – | NOT tested (original library: not installed) |
| Dialogues | – | list.txt | – |

### test/a

| peer | mode | passed | not run, and why |
|---|---|---|---|
| some client | clear, EXPORT_NAME | whole disk, in/parts | random, death: n/a (copies: all) |
| some client | TLS, GO | – | n/a (a\|b) |

4 passed, 1 not tested.
`

func TestTable(t *testing.T) {
	var progress strings.Builder
	r := newResults(&progress)
	if err := r.read(strings.NewReader(strings.Join(events, "\n") + "\n")); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(table, r.markdown()); diff != "" {
		t.Errorf("the table differs (-want +got):\n%s", diff)
	}
	if want := "ok    m/test/a  2.0s\nok    m/b  0.0s\n"; progress.String() != want {
		t.Errorf("progress: got %q, want %q", progress.String(), want)
	}
}

// Failed tests are printed with their output, and so are lines that are not events.
func TestFailureIsPrinted(t *testing.T) {
	var progress strings.Builder
	err := newResults(&progress).read(strings.NewReader(`no event
{"ImportPath":"m/c","Action":"build-output","Output":"x.go:1: bad\n"}
{"Action":"run","Package":"m/a","Test":"TestA"}
{"Action":"output","Package":"m/a","Test":"TestA","Output":"    a_test.go:1: got 1, want 2\n"}
{"Action":"fail","Package":"m/a","Test":"TestA"}
{"Action":"fail","Package":"m/a"}
`))
	if err != nil {
		t.Fatal(err)
	}
	want := "no event\nx.go:1: bad\nFAIL  m/a TestA\n          a_test.go:1: got 1, want 2\nFAIL  m/a \n"
	if progress.String() != want {
		t.Errorf("got %q, want %q", progress.String(), want)
	}
}

func TestSplice(t *testing.T) {
	got, err := splice("head\n"+begin+"old\n"+end+"tail\n", "new\n")
	if want := "head\n" + begin + "new\n" + end + "tail\n"; err != nil || got != want {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
	for _, document := range []string{"", begin, end, end + begin} {
		if _, err := splice(document, "new\n"); err == nil {
			t.Errorf("%q: got no error", document)
		}
	}
}

// A run that fails leaves the document as it is.
func TestFailedRunWritesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "INTEROP.md")
	before := begin + "old\n" + end
	if err := os.WriteFile(path, []byte(before), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := run(path, []string{"./no-such-folder"}, &strings.Builder{}); err == nil {
		t.Error("got no error from a run of nothing")
	}
	if after, err := os.ReadFile(path); err != nil || string(after) != before {
		t.Errorf("got %q, %v, want %q", after, err, before)
	}
}
