package vdi_test

import (
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"

	"xapi-nbd/vdi"
	"xapi-nbd/vdi/blockdev"
	"xapi-nbd/xapi"
	"xapi-nbd/xapi/xapitest"
)

// memStateDir is the state folder on a vdi.MemFS, the one of a real host.
const memStateDir = "/var/lib/xapi-nbd"

// process is one run of the service. It has a file system and a socket of xapi of its own,
// which can both be cut off.
type process struct {
	host    *xapitest.Host
	files   *vdi.MemFS
	socket  string // a link to the host's
	client  *xapi.Client
	manager *vdi.Manager // nil until open has succeeded
}

var processes atomic.Int64

// newProcess makes a process without a manager. The caller ends it with cut.
func newProcess(host *xapitest.Host, files *vdi.MemFS) (*process, error) {
	p := &process{host: host, files: files}
	p.socket = filepath.Join(filepath.Dir(host.Socket()), fmt.Sprintf("p%d", processes.Add(1)))
	if err := os.Symlink(host.Socket(), p.socket); err != nil {
		return nil, err
	}
	p.client = xapi.New(xapi.Config{Socket: p.socket})
	return p, nil
}

// open opens the manager; change adjusts its configuration.
func (p *process) open(change ...func(*vdi.Config)) error {
	cfg := vdi.Config{
		Client: p.client, StateDir: memStateDir, DeviceDir: p.host.DeviceDir(), Inventory: p.host.Inventory(),
		Roots: blockdev.Roots{Sys: p.host.SysDir(), NBD: p.host.NBDDir()},
	}
	for _, c := range change {
		c(&cfg)
	}
	m, err := vdi.OpenFS(cfg, p.files)
	if err == nil {
		p.manager = m
	}
	return err
}

// cut cuts the power: from now on the process has no effect on files and on xapi. Calls that
// have reached the host go on there. It may be called by a hook.
func (p *process) cut() {
	p.files.Cut()
	_ = os.Remove(p.socket) // a second time it is gone
	p.host.DropConnections()
}

// disconnect removes the process's socket of xapi.
func (p *process) disconnect() {
	_ = os.Remove(p.socket) // a second time it is gone
	p.client.Close()
}

// bury ends the goroutines of the process after cut, and closes its devices, as the kernel
// does for a process that has ended.
func (p *process) bury() {
	if p.manager != nil {
		p.manager.Kill()
	}
	p.client.Close()
}
