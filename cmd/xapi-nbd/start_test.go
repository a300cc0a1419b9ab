package main

import (
	"bytes"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"xapi-nbd/nbd/wire"
	"xapi-nbd/xapi/xapitest"
)

// TestStartErrors: faults at the start, and their exit codes.
func TestStartErrors(t *testing.T) {
	tests := []struct {
		name string
		args func(t *testing.T, w *world) []string
		code int
		text string
	}{
		{"address that can never be had", func(_ *testing.T, w *world) []string {
			return []string{"--listen=unix:" + w.file("file", "")}
		}, exitBind, "the file there is not a socket"},
		{"xapi unreachable", func(_ *testing.T, w *world) []string {
			w.host.Stop()
			return []string{"--config=" + w.file("wait.toml", `startup_wait = "100ms"`)}
		}, exitUnreachable, "xapi unreachable within startup_wait"},
		{"certificate required and broken", func(_ *testing.T, w *world) []string {
			return []string{"--tls=require", "--certfile=" + w.file("bad.pem", "nonsense")}
		}, exitUsage, "certfile"},
		{"state folder is a file", func(_ *testing.T, w *world) []string {
			return []string{"--state-dir=" + w.file("state-file", "")}
		}, exitUsage, "state folder"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, xapitest.Config{})
			p := w.launch(tt.args(t, w)...)
			<-p.ended
			if code := p.cmd.ProcessState.ExitCode(); code != tt.code {
				t.Errorf("exit code: got %d, want %d", code, tt.code)
			}
			if !strings.Contains(p.output(), tt.text) {
				t.Errorf("the output does not say %q:\n%s", tt.text, p.output())
			}
		})
	}
}

// TestBrokenCertificate: with an unusable certificate clients of insecure networks are served,
// and those that need TLS are refused with the reason.
func TestBrokenCertificate(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	pem := w.file("bad.pem", "nonsense")
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	p := w.start("--certfile=" + pem)
	w.wantReply(t, p, vdi, false, 0, "")
	w.waitClean(p)
	p.stop(patience)

	w.host.SetPurposes(w.network, "nbd")
	p = w.start("--certfile=" + pem)
	w.wantReply(t, p, vdi, false, wire.RepErrPolicy, "no usable certificate")

	// It is replaced by rename, as xapi does it, and used without a restart.
	good, err := os.ReadFile(w.trust.Server)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(w.file("new.pem", string(good)), pem); err != nil {
		t.Fatal(err)
	}
	w.wantReply(t, p, vdi, true, 0, "")
	w.waitClean(p)
}

// TestOddCertificateIsUsed: a new certificate is used with any serial number, and with any
// content after it in the file.
func TestOddCertificateIsUsed(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	p := w.start()
	data, err := os.ReadFile(w.trust.Server)
	if err != nil {
		t.Fatal(err)
	}
	key, rest := pem.Decode(data)
	old, _ := pem.Decode(rest)
	version := []byte{0xa0, 3, 2, 1, 2} // followed by the serial number
	odd := bytes.Replace(old.Bytes, append(version, 2, 1, 1), append(version, 2, 1, 0xff), 1)
	if bytes.Equal(odd, old.Bytes) {
		t.Fatal("the serial number is not 1")
	}
	file := append(pem.EncodeToMemory(key), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: odd})...)
	file = append(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: odd})...)
	file = append(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: odd[:50]})...)
	if err := os.Rename(w.file("new.pem", string(file)), w.trust.Server); err != nil {
		t.Fatal(err)
	}
	w.trust.Client.InsecureSkipVerify = true // the signature is that of the old one
	client, err := w.dial(p, true)
	if err != nil {
		t.Fatal(err)
	}
	got := client.TLS().PeerCertificates
	if len(got) != 2 || !bytes.Equal(got[0].Raw, odd) || !bytes.Equal(got[1].Raw, odd) {
		t.Errorf("got %d certificates, or not the new one", len(got))
	}
	if err := client.Abort(); err != nil {
		t.Error(err)
	}
	p.waitLine("part of the certificate chain is left out")
}

// Every address gets its line, at every log level, and the stale socket of a
// killed process is no obstacle.
func TestListeningLines(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	socket := filepath.Join(w.dir, "nbd.sock")
	args := []string{"--listen=[::1]:0", "--listen=unix:" + socket, "--log-level=error"}
	for range 2 {
		p := w.launch(args...)
		p.waitLine("listening on " + socket)
		p.waitLine("listening on [::1]:")
		p.waitLine("listening on 127.0.0.1:")
		p.kill()
	}
	// A socket that is in use is one.
	p := w.launch(args...)
	p.waitLine("listening on " + socket)
	second := w.launch("--listen=unix:"+socket, "--state-dir="+filepath.Join(w.dir, "other"))
	second.waitLine("another process listens there")
}

// Signals that mean nothing here must not kill.
func TestOtherSignalsDoNotKill(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	p := w.start()
	for _, sig := range []os.Signal{syscall.SIGUSR1, syscall.SIGALRM, syscall.SIGPIPE, syscall.SIGHUP} {
		if err := p.cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
	}
	p.waitLine("SIGHUP")
	w.wantReply(t, p, vdi, false, 0, "")
	w.waitClean(p)
	if code := p.stop(patience); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
}
