package nbd

import (
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"

	"xapi-nbd/nbd/wire"
)

// linesWith are the log lines of level info and above that contain all parts.
func (s *testServer) linesWith(parts ...string) (found []string) {
line:
	for line := range strings.Lines(s.log.String()) {
		for _, part := range parts {
			if !strings.Contains(line, part) {
				continue line
			}
		}
		if !strings.Contains(line, "level=DEBUG") {
			found = append(found, line)
		}
	}
	return found
}

// wantLine expects exactly one log line with all parts.
func (s *testServer) wantLine(t *testing.T, parts ...string) string {
	t.Helper()
	lines := s.linesWith(parts...)
	if len(lines) != 1 {
		t.Fatalf("got %d lines with %q, want 1:\n%s", len(lines), parts, s.log)
	}
	return lines[0]
}

// publicExporter is an Exporter that names its exports in the log.
type publicExporter struct{ Exporter }

func (publicExporter) PublicName(name string) string {
	public, _, _ := strings.Cut(name, "?")
	return public
}

// A refusal is one line that names the export, the rule, the reason, its cause and
// the remedy, and nothing twice.
func TestRefusalNamesExportRuleAndRemedy(t *testing.T) {
	for _, opt := range []wire.Option{wire.OptGo, wire.OptInfo, wire.OptExportName} {
		t.Run(opt.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				s.Exporter = publicExporter{s.exports}
				s.exports.open = func(context.Context, Peer, string) (Device, error) {
					return nil, &Refusal{
						Kind: ErrPolicy, Text: "session rejected (SESSION_INVALID)", Rule: "session", Remedy: "log in again",
						Cause: errors.New("session rejected: session.get_record: HTTP 200"),
					}
				}
				p := s.connect()
				p.greet(fixedNoZeroes)
				name := "/disk?" + secretName
				if opt == wire.OptExportName {
					p.option(opt, []byte(name))
				} else {
					p.refused(opt, infoRequest(name), wire.RepErrPolicy)
					p.nc.Close()
				}
				p.end()
				line := s.wantLine(t, "conn=1")
				for _, part := range []string{
					"level=WARN", `msg="export refused"`, "remote=", "export=/disk", "rule=session", "reply=NBD_REP_ERR_POLICY",
					`reason="session rejected (SESSION_INVALID)"`, `cause="session.get_record: HTTP 200"`, `remedy="log in again"`,
				} {
					if !strings.Contains(line, part) {
						t.Errorf("the line lacks %s: %s", part, line)
					}
				}
				if strings.Contains(s.log.String(), secretName) {
					t.Errorf("the log holds a secret:\n%s", s.log)
				}
			})
		})
	}
}

// Options that clients send in a row for one purpose are refused once: they count once and
// are one line in the log. Another export is another refusal.
func TestEqualRefusalsInARowAreOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		s.exports.open = func(context.Context, Peer, string) (Device, error) {
			return nil, &Refusal{Kind: ErrUnknownExport, Text: "no such disk", Rule: "no_disk"}
		}
		p := s.connect()
		p.greet(fixedNoZeroes)
		p.option(wire.OptStructuredReply, nil)
		p.want(wire.OptStructuredReply, wire.RepAck)
		for i, name := range []string{"a", "b"} {
			meta := wire.MetaContextRequest{Export: name, Queries: []string{wire.BaseAllocation}}.Append(nil)
			p.refused(wire.OptSetMetaContext, meta, wire.RepErrUnknown)
			p.refused(wire.OptGo, infoRequest(name), wire.RepErrUnknown)
			if n := len(s.linesWith("rule=no_disk")); n != i+1 {
				t.Errorf("%s: %d lines, want %d:\n%s", name, n, i+1, s.log)
			}
			if n := s.Totals().Refusals["no_disk"]; n != int64(i+1) {
				t.Errorf("%s: %d refusals are counted, want %d", name, n, i+1)
			}
		}
		p.option(wire.OptAbort, nil)
		p.want(wire.OptAbort, wire.RepAck)
		p.end()
		if n := len(s.linesWith("conn=1")); n != 2 {
			t.Errorf("%d lines, want 2:\n%s", n, s.log)
		}
	})
}

// A client that continues without TLS is served, and its refused STARTTLS is not logged. If
// it does not continue, the refusal is logged once, however the connection ends.
func TestStartTLSWhereThereIsNone(t *testing.T) {
	for _, end := range []string{"serve", "abort", "close"} {
		t.Run(end, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newTestServer(t)
				p := s.connect()
				p.greet(fixedNoZeroes)
				p.refused(wire.OptStartTLS, nil, wire.RepErrPolicy)
				want := 1
				switch end {
				case "serve":
					p.goTo("a")
					p.disc()
					want = 0
				case "abort":
					p.option(wire.OptAbort, nil)
					p.want(wire.OptAbort, wire.RepAck)
				case "close":
					p.nc.Close()
				}
				p.end()
				lines := s.linesWith(`msg="option refused"`, "rule=tls_not_available", "opt=NBD_OPT_STARTTLS", "remedy=")
				if len(lines) != want || len(s.linesWith("ended without")) != 0 {
					t.Errorf("got %d lines, want %d:\n%s", len(lines), want, s.log)
				}
				if n := s.Totals().Refusals[RuleTLSNotAvailable]; n != 1 {
					t.Errorf("%d refusals are counted, want 1", n)
				}
			})
		})
	}
}

// An option that the server does not know is no refusal of the client.
func TestUnknownOptionIsNoRefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestServer(t)
		p := s.connect()
		p.greet(fixedNoZeroes)
		p.refused(4711, nil, wire.RepErrUnsup)
		p.goTo("a")
		p.disc()
		p.end()
		if lines := s.linesWith("option refused"); len(lines) != 0 {
			t.Errorf("got %q", lines)
		}
		if total := s.Totals(); fmt.Sprint(total.Refusals) != fmt.Sprint(zeroCounts(Rules())) || total.OptionErrors["NBD_REP_ERR_UNSUP"] != 1 {
			t.Errorf("got %v and %v", total.Refusals, total.OptionErrors)
		}
	})
}

// Every reason for the end of a connection in this package belongs to a kind.
func TestEveryEndHasAKind(t *testing.T) {
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, name := range names {
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || strings.HasSuffix(name, "_test.go") {
				return true
			}
			if f, ok := call.Fun.(*ast.Ident); !ok || f.Name != "hardDisconnect" {
				return true
			}
			arg := call.Args[0]
			if sum, ok := arg.(*ast.BinaryExpr); ok {
				arg = sum.X
			}
			if lit, ok := arg.(*ast.BasicLit); ok {
				reason, _ := strconv.Unquote(lit.Value)
				found++
				if kind := endKind(hardDisconnect(reason, nil)); kind == EndOther {
					t.Errorf("%s: %q has no kind", name, reason)
				}
			}
			return true
		})
	}
	if found < 10 {
		t.Errorf("found %d reasons in the code", found)
	}
	for want, err := range map[string]error{
		EndDisconnect: nil, EndStopped: hardDisconnect("not drained in time", ErrServerClosed), EndOther: errors.New("x"),
		EndIdle: hardDisconnect("idle: no request within 1h", nil), EndLost: hardDisconnect(errPeerGone.Error(), nil),
	} {
		if got := endKind(err); got != want {
			t.Errorf("%v: got %s, want %s", err, got, want)
		}
	}
}
