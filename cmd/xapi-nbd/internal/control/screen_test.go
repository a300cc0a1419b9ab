package control

import (
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// TestScreenShowsBlocks: an attachment has a line about its blocks, once they are known.
func TestScreenShowsBlocks(t *testing.T) {
	for line, blocks := range map[string]BlocksReport{
		"  12.0 GiB in blocks with data\n":       {Known: true, Data: 12 << 30},
		"  0 B in blocks with data\n":            {Known: true},
		"  all blocks count as data: writable\n": {Reason: "writable"},
		" 1       0s\n":                          {},
	} {
		now := time.Now()
		text := Screen(&StatusReport{Now: now, Started: now, Xapi: XapiReport{Reachable: true, LastAnswer: &now},
			Attachments: []AttachmentReport{{VDI: "11111111-2222-3333-4444-555555555555", Stage: "attached", Users: 1, Since: now, Blocks: blocks}}}, nil)
		if !strings.HasSuffix(text, line) {
			t.Errorf("%+v: the screen does not end with %q:\n%s", blocks, line, text)
		}
	}
}

// TestScreenIsNarrow: every screen fits on a terminal of 80 columns.
func TestScreenIsNarrow(t *testing.T) {
	now := time.Now()
	long := strings.Repeat("an error that does not end ", 20) + strings.Repeat("x", 200)
	uuid := "11111111-2222-3333-4444-555555555555"
	r := &StatusReport{
		Version: strings.Repeat("v", 100), State: StateWaiting, PID: 4194304, Now: now, Started: now.Add(-1000 * 24 * time.Hour),
		Listening: []string{"[2001:db8:1111:2222:3333:4444:5555:6666%a-very-long-zone-name]:65535", "/" + strings.Repeat("path", 30)},
		Xapi:      XapiReport{LastError: long, LastFailed: &now},
		Limits:    LimitsReport{Connections: 1 << 30, MaxConnections: 1 << 30, InflightBytes: 1<<62 - 1, MaxInflightBytes: 1<<62 - 1, RateLimit: 1<<62 - 1, RateLimitVDI: 1},
		Refused: map[string]int64{
			"malformed_name": 1 << 60, "xapi_not_ready": 1 << 60, "draining": 1 << 60, "tls_policy": 1 << 60, "still_attaching": 1 << 60,
		},
		Attachments: []AttachmentReport{{
			VDI: uuid, VDIName: strings.Repeat("disk ", 20), VMName: strings.Repeat("v", 200), VBD: uuid, Size: 1023 << 30,
			Stage: "recording", Users: 999999, Since: now.Add(-9999 * time.Hour),
		}},
		Connections: []ConnectionReport{
			{
				ID: "99999999999", Peer: "[2001:db8:1111:2222:3333:4444:5555:6666]:65535", TLS: "TLS 1.3", State: "negotiating", VDI: uuid,
				Since: now.Add(-9999 * time.Hour), Bytes: 1<<62 - 1, Rate: 1023 << 30, InFlight: 99999, LastError: long,
				Size: 1<<62 - 1, Position: 1<<62 - 1, Percent: 100, SecondsLeft: new(int64(100 * 365 * 24 * time.Hour / time.Second)),
			},
			{ID: "1", Peer: strings.Repeat("p", 200), State: "serving", Since: now, Rate: 1<<63 - 1},
		},
		Retries: []RetryReport{
			{Action: "listen /" + strings.Repeat("path", 30), Since: now.Add(-9999 * time.Hour), Attempts: 1<<31 - 1, LastError: long, Next: now.Add(15 * time.Second)},
			{Action: "lock the state folder", Since: now.Add(-90 * time.Second), Attempts: 12, LastError: "it is locked", Next: now},
		},
		LogDropped: 1 << 60,
		Journal:    []string{uuid, uuid[:35] + "6"}, JournalErr: "",
	}
	text := Screen(r, nil)
	wantNarrow(t, text)
	for _, want := range []string{uuid[:35] + "6", "  [2001:db8:1111:2222:3333:4444:5555:6666]:65535\n", "last error: an error", "draining 1152921504606846976",
		"log lines dropped      1152921504606846976\n", "\n  it is locked\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("the screen lacks %q:\n%s", want, text)
		}
	}
	if want := regexp.MustCompile(`(?m)^lock the state folder +12 +1m30s +0s$`); !want.MatchString(text) {
		t.Errorf("the screen lacks the action that is tried again:\n%s", text)
	}
	if want := regexp.MustCompile(`(?m) 100% +>99d +99999 416d15h$`); !want.MatchString(text) {
		t.Errorf("the screen does not tell the progress:\n%s", text)
	}
	if n := strings.Count(text, "\n"); n > 48 {
		t.Errorf("an error fills the screen: %d lines\n%s", n, text)
	}
	r.JournalErr = long
	wantNarrow(t, Screen(r, r))
}

func TestUnits(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1<<20 - 1: "1.0 MiB", 64 << 20: "64.0 MiB", 1<<63 - 1: "8.0 EiB",
	} {
		if got := bytesText(n); got != want {
			t.Errorf("%d bytes: got %q, want %q", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 59 * time.Second: "59s", 61 * time.Second: "1m01s",
		90 * time.Minute: "1h30m", 49 * time.Hour: "2d01h",
	} {
		if got := age(d); got != want {
			t.Errorf("%v: got %q, want %q", d, got, want)
		}
	}
}

// wantNarrow requires lines of at most 80 columns.
func wantNarrow(t *testing.T, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > 80 {
			t.Errorf("a line of %d columns: %q", n, line)
		}
	}
}
