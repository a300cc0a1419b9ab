package check

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// wantFindings requires these findings, and no other warnings and problems.
func wantFindings(t *testing.T, report *Report, want []wanted) {
	t.Helper()
	matches := func(f Finding, w wanted) bool {
		return f.Level == w.level && f.Subject == w.subject && strings.Contains(f.Detail, w.detail) && strings.Contains(f.Remedy, w.remedy)
	}
	for _, w := range want {
		if !slices.ContainsFunc(report.Findings, func(f Finding) bool { return matches(f, w) }) {
			t.Errorf("not found: %+v", w)
		}
	}
	for _, f := range report.Findings {
		if f.Level != LevelOK && !slices.ContainsFunc(want, func(w wanted) bool { return matches(f, w) }) {
			t.Errorf("found, and not wanted: %+v", f)
		}
	}
	if t.Failed() {
		t.Logf("the report:\n%s", textOf(t, report))
	}
}

func textOf(t *testing.T, report *Report) string {
	t.Helper()
	var b strings.Builder
	if err := report.Text(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// wantNoSecret requires that the text contains no ref of xapi, so no session either.
func (s *scene) wantNoSecret(text string) {
	s.t.Helper()
	if strings.Contains(text, "OpaqueRef:") {
		s.t.Errorf("a ref is printed:\n%s", text)
	}
	for _, secret := range s.secrets {
		if strings.Contains(text, secret) {
			s.t.Errorf("a session ref is printed:\n%s", text)
		}
	}
}

// wantReadable requires lines of at most 80 columns, except for single long words.
func wantReadable(t *testing.T, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if utf8.RuneCountInString(line) > 80 && len(strings.Fields(line)) > 1 {
			t.Errorf("longer than 80 columns: %q", line)
		}
	}
}

// wantSchema requires the JSON that is documented for programs.
func wantSchema(t *testing.T, report *Report) {
	t.Helper()
	var b bytes.Buffer
	if err := report.JSON(&b); err != nil {
		t.Fatal(err)
	}
	var got struct {
		Version  *string `json:"version"`
		Problems *int    `json:"problems"`
		Warnings *int    `json:"warnings"`
		Findings []struct {
			Level   string `json:"level"`
			Subject string `json:"subject"`
			Detail  string `json:"detail"`
			Remedy  string `json:"remedy"`
		} `json:"findings"`
	}
	d := json.NewDecoder(&b)
	d.DisallowUnknownFields()
	if err := d.Decode(&got); err != nil {
		t.Fatal(err)
	}
	if got.Version == nil || got.Problems == nil || got.Warnings == nil || len(got.Findings) != len(report.Findings) {
		t.Fatalf("incomplete: %+v", got)
	}
	levels := map[string]int{}
	for _, f := range got.Findings {
		levels[f.Level]++
		if f.Subject == "" || f.Detail == "" || (f.Level == LevelOK) != (f.Remedy == "") {
			t.Errorf("got %+v, want all of it, and a remedy unless it is all right", f)
		}
	}
	if levels[LevelProblem] != *got.Problems || levels[LevelWarning] != *got.Warnings ||
		levels[LevelOK]+levels[LevelProblem]+levels[LevelWarning] != len(got.Findings) {
		t.Errorf("counts: got %v, %d problems and %d warnings", levels, *got.Problems, *got.Warnings)
	}
}
