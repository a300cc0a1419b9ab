package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const endsTable = `
| peer | version |
|---|---|

| client | stop | kill -9 |
|---|---|---|
| one, 1.0 | goes on | clear: fails [1]; TLS: hangs |
| two | fails [1] | fails [2] |

1. "lost: 'EIO'"
2. "refused"

8 passed, 0 not tested.
`

// The ends have a table of their own, and no row in the table of their package.
func TestEndsTable(t *testing.T) {
	lines := []string{
		"one, 1.0/clear/stop: goes on", "one, 1.0/TLS/stop: goes on", "two/clear/stop: fails: lost: `EIO`", "two/TLS/stop: fails: lost: `EIO`",
		"one, 1.0/clear/kill -9: fails: lost: `EIO`", "one, 1.0/TLS/kill -9: hangs", "two/clear/kill -9: fails: refused", "two/TLS/kill -9: fails: refused",
	}
	var b strings.Builder
	event := func(action, test, output string) {
		e := map[string]string{"Action": action, "Package": "m/a", "Test": test, "Output": output}
		if err := json.NewEncoder(&b).Encode(e); err != nil {
			t.Fatal(err)
		}
	}
	event("run", "TestEnds", "")
	for _, line := range lines {
		place, _, _ := strings.Cut(line, ": ")
		test := "TestEnds/" + strings.NewReplacer(" ", "_", "/", "_").Replace(place)
		event("run", test, "")
		event("output", test, "    ends_test.go:1: end: "+line+"\n")
		event("pass", test, "")
	}
	event("pass", "TestEnds", "")
	event("pass", "", "")
	r := newResults(new(strings.Builder))
	if err := r.read(strings.NewReader(b.String())); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(endsTable, r.markdown()); diff != "" {
		t.Errorf("the table differs (-want +got):\n%s", diff)
	}
}
