package main

import (
	"bytes"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"xapi-nbd/cmd/nbd-tool/internal/control"
	"xapi-nbd/mirror"
)

func TestMirrorProgress(t *testing.T) {
	copying := mirror.Status{State: mirror.Copying, Size: 1000, Dirty: 400, Rate: 3 << 20, TimeLeft: 90 * time.Second}
	paused, unknown, equal := copying, copying, copying
	paused.Paused, unknown.TimeLeft = true, -1
	equal.State, equal.Dirty, equal.TimeLeft = mirror.InSync, 0, 0
	for want, s := range map[string]mirror.Status{
		"copying, 400 of 1000 bytes to be copied, 3.0 MiB/s, 1m30s left": copying,
		"copying, 400 of 1000 bytes to be copied, paused":                paused,
		"copying, 400 of 1000 bytes to be copied, 3.0 MiB/s":             unknown,
		"in sync, 0 of 1000 bytes to be copied, 3.0 MiB/s":               equal,
	} {
		if got := progressText(s); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		p, begin := newMirrorProgress(&out, true), time.Now()
		for range 2 {
			<-p.ticks()
			p.show(paused)
		}
		p.finish()
		if p.ticks() != nil || time.Since(begin) != 2*linesInterval || strings.Count(out.String(), "paused\n") != 2 {
			t.Errorf("after %v: got %q", time.Since(begin), out.String())
		}
		if newMirrorProgress(&out, false).ticks() != nil {
			t.Error("the progress is shown although standard error is no terminal")
		}
	})
}

// TestStatusForPeople: what people need to know is in the status.
func TestStatusForPeople(t *testing.T) {
	left := int64(75)
	for _, tt := range []struct {
		name string
		s    control.Status
		want []string
	}{
		{"copying", control.Status{State: "copying", Mode: "background", Serving: "primary", Size: 2 << 20, Dirty: 1 << 20, Percent: 50, Rate: 5 << 20, Converges: true, SecondsLeft: &left},
			[]string{"writes              do not wait", "equal               50.0 %", "5.0 MiB/s", "yes, in about 1m15s", "no: it is no copy of the primary yet"}},
		{"writes are as fast", control.Status{State: "copying", Mode: "background", Dirty: 1}, []string{"not yet: clients write as fast as the copy runs"}},
		{"paused", control.Status{State: "copying", Paused: true, Dirty: 1}, []string{"copying, paused", "no, it is paused"}},
		{"with troubles", control.Status{State: "mirroring", Mode: "blocking", Stalls: 3, Losses: 2, LastError: "EIO"}, []string{"are answered when both ends have them", "stalls                          3", "lost or made again  2", "EIO"}},
		{"pivoted", control.Status{State: "pivoted", Ended: true, Complete: true, Serving: "secondary"}, []string{"served by the secondary", "secondary complete  yes"}},
		{"detached", control.Status{State: "detached", Ended: true, Serving: "primary"}, []string{"no: it is no copy of the primary\n"}},
	} {
		var out bytes.Buffer
		if err := printStatus(&out, &tt.s); err != nil {
			t.Fatal(err)
		}
		for _, want := range tt.want {
			if !strings.Contains(out.String(), want) {
				t.Errorf("%s: no %q in\n%s", tt.name, want, out.String())
			}
		}
		if tt.s.Ended && strings.Contains(out.String(), "converges") {
			t.Errorf("%s: says whether it converges:\n%s", tt.name, out.String())
		}
	}
}
