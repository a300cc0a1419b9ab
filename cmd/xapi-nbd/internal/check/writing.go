package check

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// unitDirs are the folders of units, the strongest first.
var unitDirs = []string{"/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"}

// unitText returns the text of the service's unit and of its drop-ins in the order in which
// systemd reads them; "" if there is none. dirs are as unitDirs.
func unitText(dirs []string) string {
	const unit = "xapi-nbd.service"
	var text strings.Builder
	add := func(path string) bool {
		content, err := os.ReadFile(path)
		if err == nil {
			text.Write(append(content, '\n'))
		}
		return err == nil
	}
	for _, dir := range dirs {
		if add(filepath.Join(dir, unit)) {
			break
		}
	}
	dropIns := make(map[string]string) // by name: one name counts once
	for _, dir := range slices.Backward(dirs) {
		paths, _ := filepath.Glob(filepath.Join(dir, unit+".d", "*.conf")) // the pattern is right
		for _, path := range paths {
			dropIns[filepath.Base(path)] = path
		}
	}
	for _, name := range slices.Sorted(maps.Keys(dropIns)) {
		add(dropIns[name])
	}
	return strings.TrimSpace(text.String())
}

// mayWriteDevices reports whether a unit lets its processes write to block devices.
func mayWriteDevices(unit string) bool {
	restricted, allowed := false, false
	for line := range strings.Lines(unit) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch value = strings.TrimSpace(value); strings.TrimSpace(key) {
		case "DevicePolicy":
			restricted = value != "auto" && value != ""
		case "DeviceAllow":
			device, access, _ := strings.Cut(value, " ")
			if value == "" { // revokes all earlier lines
				allowed = false
				continue
			}
			restricted = true
			if device == "block-*" && (access == "" || strings.Contains(access, "w")) {
				allowed = true
			}
		}
	}
	return allowed || !restricted
}

// writing checks that the unit permits writing, if allow_write is set.
func (c *checker) writing() {
	const subject = "writing"
	if !c.cfg.AllowWrite {
		return
	}
	if !mayWriteDevices(c.facts.Unit) {
		c.warning(subject, "install -D -m 0644 /usr/share/doc/xapi-nbd/write.conf /etc/systemd/system/xapi-nbd.service.d/write.conf; "+
			"systemctl daemon-reload; systemctl restart xapi-nbd",
			"allow_write is on, and the unit may open block devices for reading only: clients that write are refused")
	}
	c.ok(subject, "allowed (allow_write). xapi does not keep a VM from starting on a disk that is written here; block its start first: "+
		`xe vm-param-set uuid=VM blocked-operations:start="restore" blocked-operations:start_on="restore"`)
}
