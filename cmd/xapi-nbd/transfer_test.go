package main

import (
	"context"
	"io"
	"net"
	"os/exec"

	"xapi-nbd/test/requires"
	"xapi-nbd/xapi/xapitest"
)

// transfer is a copy that is blocked half way, because nobody reads the output of nbdcopy.
type transfer struct {
	cmd *exec.Cmd
	out io.ReadCloser
}

// startTransfer starts a transfer and returns when the first data has arrived.
func (w *world) startTransfer(p *process, vdi string) *transfer {
	w.t.Helper()
	cmd := exec.Command(requires.Tool(w.t, "nbdcopy"), w.uri(p, w.export(vdi), false), "-")
	out, err := cmd.StdoutPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	tr := &transfer{cmd: cmd, out: out}
	w.t.Cleanup(tr.kill)
	if _, err := io.ReadFull(out, make([]byte, 64<<10)); err != nil {
		w.t.Fatal(err)
	}
	if n := len(w.host.VBDs()); n != 1 {
		w.t.Fatalf("VBDs in mid-transfer: got %d, want 1", n)
	}
	return tr
}

func (tr *transfer) kill() {
	_ = tr.cmd.Process.Kill()
	_ = tr.cmd.Wait()
}

// diskSize is more than pipes and socket buffers hold.
const diskSize = 64 << 20

// waitCalls waits until the host has seen n calls of a method.
func (w *world) waitCalls(method string, n int) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err := w.host.Wait(ctx, func([]xapitest.VBD) bool {
		seen := 0
		for _, c := range w.host.Calls() {
			if c.Method == method {
				seen++
			}
		}
		return seen >= n
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// asyncExportName is exportName without waiting for the reply. The channel is closed when the
// connection has ended.
func (w *world) asyncExportName(p *process, name string) (net.Conn, <-chan struct{}) {
	w.t.Helper()
	c, err := net.Dial("tcp", p.addr)
	if err != nil {
		w.t.Fatal(err)
	}
	msg := append([]byte{0, 0, 0, 1}, "IHAVEOPT\x00\x00\x00\x01"...)
	msg = append(msg, 0, 0, byte(len(name)>>8), byte(len(name)))
	if _, err := c.Write(append(msg, name...)); err != nil {
		w.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(io.Discard, c)
	}()
	return c, done
}
