package nbd

import (
	"slices"
	"strings"
	"testing"

	"xapi-nbd/nbd/wire"
)

// TestForgiveNUL: one NUL behind the name in EXPORT_NAME is forgiven if the server is told to,
// no other one, and in no other option.
func TestForgiveNUL(t *testing.T) {
	for _, tt := range []struct {
		name    string
		forgive bool
		sent    string
		opened  []string // the name that the exporter is asked for; none if refused
	}{
		{"strict", false, "disk\x00", nil},
		{"strict without", false, "disk", []string{"disk"}},
		{"forgiven", true, "disk\x00", []string{"disk"}},
		{"nothing to forgive", true, "disk", []string{"disk"}},
		{"alone", true, "\x00", []string{""}},
		{"two", true, "disk\x00\x00", nil},
		{"in front", true, "\x00disk", nil},
		{"in the middle", true, "di\x00sk", nil},
		{"in the middle and behind", true, "di\x00sk\x00", nil},
		{"not UTF-8", true, "disk\xff\x00", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newTestServer(t)
			s.ForgiveNUL = tt.forgive
			p := s.connect()
			p.greet(wire.FlagCFixedNewstyle | wire.FlagCNoZeroes)
			p.option(wire.OptExportName, []byte(tt.sent))
			if tt.opened == nil {
				if err := p.closed(); err == nil || !strings.Contains(err.Error(), "refused") {
					t.Errorf("the connection ended with %v", err)
				}
			} else {
				p.receive(wire.ExportNameReplyLen)
				p.disc()
				if err := p.end(); err != nil {
					t.Errorf("the connection ended with %v", err)
				}
			}
			if names := s.exports.opened(); !slices.Equal(names, tt.opened) {
				t.Errorf("the exporter was asked for %q, want %q", names, tt.opened)
			}
		})
	}
}

// TestForgiveNULElsewhere: the option that has error replies is as strict as ever.
func TestForgiveNULElsewhere(t *testing.T) {
	s := newTestServer(t)
	s.ForgiveNUL = true
	p := s.connect()
	p.greet(wire.FlagCFixedNewstyle | wire.FlagCNoZeroes)
	p.refused(wire.OptGo, wire.InfoRequest{Name: "disk\x00"}.Append(nil), wire.RepErrInvalid)
	p.goTo("disk")
	p.disc()
}
