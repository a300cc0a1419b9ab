package interop

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"xapi-nbd/xapi"
)

var xapiProgram = program{
	name:    "xapi",
	library: library{"xmlrpc-light", "xmlrpc-light.cmxa", "libxmlrpc-light-ocaml-dev"},
}

// host is the running xapi in OCaml, and our client.
type host struct {
	running // its facts are listed in xapi.ml
	wire    string
	socket  string
	client  *xapi.Client
}

// startHost starts a xapi that answers the first calls as if it were booting. It ends by stop
// or at the end of the test.
func startHost(t *testing.T, wire string, booting int) *host {
	t.Helper()
	dir, err := os.MkdirTemp("", "xapi") // t.TempDir may be too long for the address of a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	h := &host{wire: wire, socket: filepath.Join(dir, "xapi")}
	h.client = xapi.New(xapi.Config{Socket: h.socket, CallTimeout: timeout, MutateTimeout: timeout})
	t.Cleanup(h.client.Close)
	h.start(t, booting)
	return h
}

func (h *host) start(t *testing.T, booting int) {
	t.Helper()
	h.running = xapiProgram.start(t, h.socket, h.wire, strconv.Itoa(booting))
}

// login returns a session of root.
func (h *host) login(t *testing.T) *xapi.Session {
	t.Helper()
	s, err := h.client.Login(t.Context(), "interop")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// vdi returns the ref of a VDI that our client found by its uuid.
func (h *host) vdi(t *testing.T, s *xapi.Session, name string) xapi.VDIRef {
	t.Helper()
	ref, err := s.VDIByUUID(t.Context(), h.facts[name])
	if err != nil {
		t.Fatal(err)
	}
	if want := h.facts[name+"-ref"]; string(ref) != want {
		t.Fatalf("VDI %s: got the ref %s, want %s", name, ref, want)
	}
	return ref
}

// dom0 returns the ref of the control domain.
func (h *host) dom0(t *testing.T, s *xapi.Session) xapi.VMRef {
	t.Helper()
	ref, err := s.VMByUUID(t.Context(), h.facts["dom0"])
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// create creates a VBD of a VDI for the control domain.
func (h *host) create(t *testing.T, s *xapi.Session, vdi string, config map[string]string) xapi.VBDRef {
	t.Helper()
	vbd, err := s.CreateVBD(t.Context(), xapi.VBDSpec{VM: h.dom0(t, s), VDI: h.vdi(t, s, vdi), OtherConfig: config})
	if err != nil {
		t.Fatal(err)
	}
	return vbd
}

// record returns the record of a VBD.
func record(t *testing.T, s *xapi.Session, vbd xapi.VBDRef) xapi.VBDRecord {
	t.Helper()
	r, err := s.VBDRecord(t.Context(), vbd)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// wantFailure expects an error of xapi with a code and parameters.
func wantFailure(t *testing.T, err error, code xapi.ErrorCode, params ...string) {
	t.Helper()
	var failed *xapi.Error
	if !errors.As(err, &failed) || !errors.Is(err, code) {
		t.Errorf("got error %v, want %s", err, code)
		return
	}
	if got, want := strings.Join(failed.Params, "|"), strings.Join(params, "|"); got != want {
		t.Errorf("%s: got the parameters %q, want %q", code, got, want)
	}
}

// withheld replaces the refs of sessions in errors.
const withheld = "<session>"
