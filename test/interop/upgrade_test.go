package interop

import (
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// upgradesInAPull is how often the service is upgraded during one copy.
const upgradesInAPull = 20

// TestUpgradesDuringPulls upgrades the service during copies by clients that anybody can
// install. TestXO does so with Xen Orchestra's.
func TestUpgradesDuringPulls(t *testing.T) {
	content := randomBytes(3, diskSize)
	for name, pull := range map[string]copying{"nbdkit": nbdkitCopy} {
		for _, secure := range []bool{false, true} {
			m := mode{secure: secure}
			t.Run(name+", "+m.String(), func(t *testing.T) {
				w := newWorld(t)
				pullDuringUpgrades(newExchange(t, w, m, w.addVDI(t, content), content), pull)
			})
		}
	}
}

// pullDuringUpgrades makes one copy with a program, which must succeed, during which the
// service is upgraded again and again.
func pullDuringUpgrades(x *exchange, pull copying) {
	x.t.Helper()
	main := 0
	r := x.join(&relay{part: int64(len(x.content)) / (upgradesInAPull + 1), times: upgradesInAPull, act: func() { main = x.upgrade() }})
	out := x.file("copy")
	x.run(pull(x, out))
	x.wantFile(out, x.content)
	if r.acted != upgradesInAPull {
		x.t.Errorf("upgrades during the copy: got %d, want %d", r.acted, upgradesInAPull)
	}
	if main == 0 {
		return
	}
	// The processes before have ended, or do so now.
	if err := syscall.Kill(main, syscall.SIGTERM); err != nil {
		x.t.Error(err)
	}
	<-x.w.service.ended
}

// upgrade upgrades the service and returns the new process.
func (x *exchange) upgrade() (pid int) {
	path, err := program()
	if err != nil {
		x.t.Error(err)
		return 0
	}
	out, err := exec.CommandContext(x.t.Context(), path, "upgrade", "--state-dir="+x.w.stateDir()).CombinedOutput()
	text, found := strings.CutPrefix(string(out), "Process ")
	number, _, _ := strings.Cut(text, ",")
	pid, nerr := strconv.Atoi(number)
	if err != nil || !found || nerr != nil {
		x.t.Errorf("upgrade: %v\n%s", err, out)
	}
	return pid
}
