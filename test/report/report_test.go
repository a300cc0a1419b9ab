package main

import (
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	tests := []struct {
		name   string
		events []string
		want   string
	}{
		{"pass with subtests", []string{
			`{"Action":"start","Package":"p"}`,
			`{"Action":"run","Package":"p","Test":"TestA"}`,
			`{"Action":"output","Package":"p","Test":"TestA","Output":"=== RUN   TestA\n"}`,
			`{"Action":"run","Package":"p","Test":"TestA/x"}`,
			`{"Action":"pass","Package":"p","Test":"TestA/x"}`,
			`{"Action":"run","Package":"p","Test":"TestA/y"}`,
			`{"Action":"pass","Package":"p","Test":"TestA/y"}`,
			`{"Action":"pass","Package":"p","Test":"TestA"}`,
			`{"Action":"output","Package":"p","Output":"PASS\n"}`,
			`{"Action":"pass","Package":"p","Elapsed":1.25}`,
		}, "ok    p  1.2s\n2 passed, 0 failed, 0 skipped\n"},
		{"skip", []string{
			`{"Action":"run","Package":"p","Test":"TestA"}`,
			`{"Action":"output","Package":"p","Test":"TestA","Output":"    a_test.go:7: needs root\n"}`,
			`{"Action":"output","Package":"p","Test":"TestA","Output":"--- SKIP: TestA (0.00s)\n"}`,
			`{"Action":"skip","Package":"p","Test":"TestA"}`,
			`{"Action":"skip","Package":"p","Test":"TestB"}`,
			`{"Action":"pass","Package":"p"}`,
			`{"Action":"skip","Package":"q"}`,
		}, "ok    p  0.0s\n-     q  no tests\nskipped: TestA: a_test.go:7: needs root (p)\n" +
			"skipped: TestB: no reason given (p)\n0 passed, 0 failed, 2 skipped\n"},
		{"failing subtest counts once", []string{
			`{"Action":"run","Package":"p","Test":"TestA/x"}`,
			`{"Action":"output","Package":"p","Test":"TestA/x","Output":"got 1, want 2\n"}`,
			`{"Action":"fail","Package":"p","Test":"TestA/x"}`,
			`{"Action":"output","Package":"p","Test":"TestA","Output":"--- FAIL: TestA\n"}`,
			`{"Action":"fail","Package":"p","Test":"TestA"}`,
			`{"Action":"output","Package":"p","Output":"-test.shuffle 17\n"}`,
			`{"Action":"fail","Package":"p"}`,
		}, "FAIL  p  0.0s\n      got 1, want 2\n      --- FAIL: TestA\n      -test.shuffle 17\n0 passed, 1 failed, 0 skipped\n"},
		{"build failure", []string{
			`{"ImportPath":"p","Action":"build-output","Output":"x.go:1: bad\n"}`,
			`{"ImportPath":"p","Action":"build-fail"}`,
			`{"Action":"start","Package":"p"}`,
			`{"Action":"fail","Package":"p","FailedBuild":"p"}`,
		}, "x.go:1: bad\nFAIL  p  0.0s  does not build\n0 passed, 1 failed, 0 skipped\n"},
		{"panic in a test that never ends, then go test is killed", []string{
			`{"Action":"output","Package":"p","Test":"TestA","Output":"panic: x\n"}`,
			`not JSON`,
		}, "not JSON\nFAIL  p  0.0s\n      panic: x\n0 passed, 1 failed, 0 skipped\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out strings.Builder
			r := newReport(&out)
			if err := r.read(strings.NewReader(strings.Join(tt.events, "\n") + "\n")); err != nil {
				t.Fatal(err)
			}
			r.close()
			if got := out.String(); got != tt.want {
				t.Errorf("got:\n%s\nwant:\n%s", got, tt.want)
			}
		})
	}
}
