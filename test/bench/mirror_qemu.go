package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"time"
)

// qemuStorageDaemon is the program that runs qemu's block layer without a virtual machine.
const qemuStorageDaemon = "qemu-storage-daemon"

// beginQemu starts a qemu-storage-daemon that serves the primary.
func (b *bench) beginQemu(ctx context.Context, s *server, secondary string) (*mirrorRun, error) {
	monitor := filepath.Join(b.dir, "qmp.sock")
	daemon, err := b.startOnce(ctx, kind{name: qemuStorageDaemon, argv: func(l launch) []string {
		return []string{
			b.programs[qemuStorageDaemon],
			"--blockdev", nbdNode("primary", s.addr),
			"--blockdev", nbdNode("secondary", secondary),
			"--nbd-server", "addr.type=inet,addr.host=" + host + ",addr.port=" + l.port,
			"--export", "type=nbd,id=export,node-name=primary,name=,writable=on",
			"--chardev", "socket,id=monitor,server=on,wait=off,path=" + monitor,
			"--monitor", "chardev=monitor",
		}
	}}, launch{})
	if err != nil {
		return nil, err
	}
	q, err := dialQMP(ctx, monitor)
	if err != nil {
		daemon.stop()
		return nil, err
	}
	mode := "write-blocking"
	if s.name == qemuBackground {
		mode = "background"
	}
	return &mirrorRun{
		server: daemon, closer: q.conn,
		copy: func(ctx context.Context) error {
			return q.run(ctx, "BLOCK_JOB_READY", "blockdev-mirror", map[string]any{
				"job-id": "mirror", "device": "primary", "target": "secondary", "sync": "full", "copy-mode": mode,
			})
		},
		complete: func(ctx context.Context) error {
			return q.run(ctx, "BLOCK_JOB_COMPLETED", "block-job-complete", map[string]any{"device": "mirror"})
		},
	}, nil
}

// nbdNode is the description of a block node that is an export.
func nbdNode(name, addr string) string {
	host, port, _ := net.SplitHostPort(addr)
	return fmt.Sprintf("driver=nbd,node-name=%s,server.type=inet,server.host=%s,server.port=%s", name, host, port)
}

// qmp is a connection to the monitor of qemu.
type qmp struct {
	conn net.Conn
	in   *json.Decoder
}

// qmpMessage is a reply or an event.
type qmpMessage struct {
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Desc string `json:"desc"`
	} `json:"error"`
	Event string `json:"event"`
	Data  struct {
		Error string `json:"error"`
	} `json:"data"`
}

// dialQMP connects to a monitor. The caller closes the connection.
func dialQMP(ctx context.Context, path string) (*qmp, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	q := &qmp{conn: c, in: json.NewDecoder(c)}
	var hello qmpMessage
	if err := q.in.Decode(&hello); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	if err := q.run(ctx, "", "qmp_capabilities", nil); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return q, nil
}

// run executes a command and returns after its reply, and after an event unless that is "".
func (q *qmp) run(ctx context.Context, event, command string, arguments map[string]any) error {
	stop := context.AfterFunc(ctx, func() { _ = q.conn.SetDeadline(time.Now()) })
	defer stop()
	request := map[string]any{"execute": command}
	if arguments != nil {
		request["arguments"] = arguments
	}
	if err := json.NewEncoder(q.conn).Encode(request); err != nil {
		return err
	}
	for replied, happened := false, event == ""; !replied || !happened; {
		var m qmpMessage
		if err := q.in.Decode(&m); err != nil {
			return fmt.Errorf("%s: %w", command, err)
		}
		switch {
		case m.Error != nil:
			return fmt.Errorf("%s: %s", command, m.Error.Desc)
		case m.Return != nil:
			replied = true
		case m.Event == "BLOCK_JOB_COMPLETED" && (m.Data.Error != "" || m.Event != event):
			return fmt.Errorf("%s: the job has ended: %q", command, m.Data.Error)
		case m.Event == event:
			happened = true
		}
	}
	return nil
}
