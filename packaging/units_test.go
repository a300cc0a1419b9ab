package packaging

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"xapi-nbd/test/requires"
)

// setting is one line of a unit.
type setting struct{ section, key, value string }

func readUnit(t *testing.T, path string) []setting {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var settings []setting
	section := ""
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if strings.HasPrefix(line, "[") {
			section = strings.Trim(line, "[]")
			continue
		}
		key, value, found := strings.Cut(line, "=")
		if !found || section == "" {
			t.Fatalf("%s: %q is no setting", path, line)
		}
		settings = append(settings, setting{section, key, value})
	}
	return settings
}

// values returns those of one key, in their order.
func values(settings []setting, key string) []string {
	var found []string
	for _, s := range settings {
		if s.key == key {
			found = append(found, s.value)
		}
	}
	return found
}

var baseUnits = []string{"xapi-nbd.service", "xapi-nbd.path", "xapi-nbd.socket"}

// Dom0's systemd warns of every key that it does not know, at each reload.
func TestUnitsAreForSystemd219(t *testing.T) {
	for _, unit := range append([]string{"xapi-nbd.service.d/memory.conf"}, baseUnits...) {
		kind := strings.TrimPrefix(filepath.Ext(unit), ".")
		if kind == "conf" {
			kind = "service"
		}
		for _, s := range readUnit(t, unit) {
			known := keys219[strings.ToLower(s.section)]
			if s.section != "Unit" && s.section != "Install" && !strings.EqualFold(s.section, kind) {
				t.Errorf("%s: section %s is of another kind of unit", unit, s.section)
			}
			if !slices.Contains(strings.Fields(known), s.key) {
				t.Errorf("%s: systemd 219 does not know %s in [%s]", unit, s.key, s.section)
			}
			if s.key == "SystemCallFilter" && strings.Contains(s.value, "@") {
				t.Errorf("%s: systemd 219 has no groups of system calls: %s", unit, s.value)
			}
			if s.key == "ProtectSystem" && s.value != "yes" && s.value != "full" {
				t.Errorf("%s: systemd 219 knows no ProtectSystem=%s", unit, s.value)
			}
			if s.key == "CapabilityBoundingSet" && strings.Contains(s.value, "CAP_BPF") {
				t.Errorf("%s: %s is newer than dom0's kernel", unit, s.value)
			}
		}
	}
}

// TestServiceUnit: the unit is started as the original's, and restarts by exit code.
func TestServiceUnit(t *testing.T) {
	unit := readUnit(t, "xapi-nbd.service")
	for _, want := range []setting{
		{"Service", "Type", "notify"},
		{"Service", "ExecStart", "/usr/sbin/xapi-nbd --certfile=/etc/xensource/xapi-ssl.pem"},
		{"Service", "ExecReload", "/bin/kill -HUP $MAINPID"},
		{"Service", "Restart", "on-failure"},
		{"Service", "StartLimitInterval", "2"},
		{"Service", "StartLimitBurst", "5"},
		{"Service", "SuccessExitStatus", "5"},
		{"Service", "RestartPreventExitStatus", "2"},
		{"Service", "RestartForceExitStatus", "SIGHUP SIGPIPE"},
		{"Service", "LimitCORE", "0"},
		{"Service", "KillMode", "process"},
		{"Service", "NoNewPrivileges", "yes"},
		{"Unit", "Wants", "xapi.service message-switch.service syslog.target"},
		{"Install", "WantedBy", "multi-user.target"},
	} {
		if !slices.Contains(unit, want) {
			t.Errorf("the service lacks %s=%s in [%s]", want.key, want.value, want.section)
		}
	}
	// systemd gives a service up when its limit of starts is reached.
	number := func(key string) int {
		n, err := strconv.Atoi(strings.Join(values(unit, key), " "))
		if err != nil {
			t.Errorf("%s: %v", key, err)
		}
		return n
	}
	if pause, limit := number("RestartSec"), number("StartLimitInterval"); pause*(number("StartLimitBurst")-1) <= limit {
		t.Errorf("with a pause of %d s between restarts a service that crashes at every start is given up", pause)
	}
	bound := strings.Fields(strings.Join(values(unit, "CapabilityBoundingSet"), " "))
	if !slices.Contains(bound, "CAP_SYS_RESOURCE") {
		t.Errorf("got capabilities %q, want CAP_SYS_RESOURCE among them, for large pipes", bound)
	}
	path := readUnit(t, "xapi-nbd.path")
	certfile := strings.Fields(strings.TrimPrefix(values(unit, "ExecStart")[0], "/usr/sbin/xapi-nbd --certfile="))[0]
	if got := values(path, "PathExists"); !slices.Equal(got, []string{certfile}) {
		t.Errorf("the path unit waits for %q, the service reads %s", got, certfile)
	}
}

// systemd itself has nothing to say against the units, and finds them closed
// enough. They are copied, and the program is one that exists.
func TestUnitsByAnalysis(t *testing.T) {
	analyze := requires.Tool(t, "systemd-analyze")
	dir := t.TempDir()
	put := func(name string) {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		text = []byte(strings.ReplaceAll(string(text), "/usr/sbin/xapi-nbd", "/bin/true"))
		if err := os.WriteFile(path, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, unit := range baseUnits {
		put(unit)
	}
	base := exposure(t, analyze, filepath.Join(dir, "xapi-nbd.service"))
	put("xapi-nbd.service.d/hardening.conf")
	hardened := exposure(t, analyze, filepath.Join(dir, "xapi-nbd.service"))
	t.Logf("exposure level: %.1f, with the drop-in %.1f", base, hardened)
	if base > 5.0 || hardened > 3.0 {
		t.Errorf("got exposure %.1f and %.1f with the drop-in, want at most 5.0 and 3.0", base, hardened)
	}
	for _, unit := range baseUnits {
		r := runIn(t, os.Environ(), analyze, "verify", "--man=no", filepath.Join(dir, unit))
		for line := range strings.Lines(r.stderr) {
			if strings.Contains(line, "xapi-nbd.") {
				t.Errorf("verify %s: %s", unit, line)
			}
		}
	}
}

var exposureLevel = regexp.MustCompile(`Overall exposure level for \S+: ([0-9.]+)`)

func exposure(t *testing.T, analyze, unit string) float64 {
	t.Helper()
	r := runIn(t, os.Environ(), analyze, "security", "--offline=true", "--no-pager", unit)
	found := exposureLevel.FindStringSubmatch(r.stdout)
	if found == nil {
		t.Fatalf("no exposure level in\n%s%s", r.stdout, r.stderr)
	}
	level, err := strconv.ParseFloat(found[1], 64)
	if err != nil {
		t.Fatal(err)
	}
	return level
}

// TestSystemCallFilters: all system calls of the program from start to stop, with a transfer,
// are on the drop-in's list of allowed calls and not on the base unit's list of forbidden
// ones.
func TestSystemCallFilters(t *testing.T) {
	strace, analyze := requires.Tool(t, "strace"), requires.Tool(t, "systemd-analyze")
	watchSources(t)
	dir := t.TempDir()
	program, trace := filepath.Join(dir, "xapi-nbd"), filepath.Join(dir, "trace")
	mustRun(t, append(os.Environ(), "CGO_ENABLED=0"), "go", "build", "-o", program, "../cmd/xapi-nbd")
	mustRun(t, os.Environ(), strace, "-f", "-qq", "-e", "signal=none", "-o", trace, program, "demo", "--once")
	text, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	called := make(map[string]bool)
	for _, found := range regexp.MustCompile(`(?m)^\d+ +(?:<\.\.\. )?([a-z0-9_]+)[( ]`).FindAllStringSubmatch(string(text), -1) {
		called[found[1]] = true
	}
	for _, call := range []string{"openat", "accept4", "flock", "fsync", "renameat"} {
		if !called[call] {
			t.Errorf("the trace lacks %s: it shows no whole life", call)
		}
	}
	// The demo's disk is a small file that travels over TLS. These are for others.
	for _, call := range []string{"splice", "pipe2", "fcntl", "preadv2", "mincore", "fadvise64", "ppoll", "ioctl"} {
		called[call] = true
	}
	refused := expand(t, analyze, readUnit(t, "xapi-nbd.service"))
	allowed := expand(t, analyze, readUnit(t, "xapi-nbd.service.d/hardening.conf"))
	for call := range called {
		if refused[call] {
			t.Errorf("xapi-nbd.service does not let the program call %s", call)
		}
		if !allowed[call] {
			t.Errorf("hardening.conf does not let the program call %s", call)
		}
	}
}

// expand applies the lines of a filter in their order, as systemd does: the first one decides
// whether the list has the allowed calls or the forbidden ones; a later line of the other
// kind removes calls from it.
func expand(t *testing.T, analyze string, unit []setting) map[string]bool {
	t.Helper()
	groups := make(map[string][]string)
	var name string
	for line := range strings.Lines(mustRun(t, os.Environ(), analyze, "--no-pager", "syscall-filter")) {
		switch word := strings.TrimSpace(line); {
		case strings.HasPrefix(line, "@"):
			name = word
		case word != "" && !strings.HasPrefix(word, "#"):
			groups[name] = append(groups[name], word)
		}
	}
	var members func(word string) []string
	members = func(word string) []string {
		if !strings.HasPrefix(word, "@") {
			return []string{word}
		}
		if len(groups[word]) == 0 {
			t.Fatalf("no group %s of system calls", word)
		}
		var all []string
		for _, member := range groups[word] {
			all = append(all, members(member)...)
		}
		return all
	}
	list := make(map[string]bool)
	first := ""
	for _, value := range values(unit, "SystemCallFilter") {
		words, isDeny := strings.CutPrefix(value, "~")
		kind := "allow"
		if isDeny {
			kind = "deny"
		}
		if words == "" {
			clear(list)
			first = ""
			continue
		}
		if first == "" {
			first = kind
			if kind == "allow" {
				for _, call := range members("@default") { // allowed always
					list[call] = true
				}
			}
		}
		for _, word := range strings.Fields(words) {
			for _, call := range members(word) {
				if kind == first {
					list[call] = true
				} else {
					delete(list, call)
				}
			}
		}
	}
	return list
}

// TestMemoryOfGenerations: the drop-ins allow the memory of all processes that upgrades may
// leave, and the kernel's end of one of them ends no other one.
func TestMemoryOfGenerations(t *testing.T) {
	source, err := os.ReadFile("../cmd/xapi-nbd/internal/service/upgrade.go")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`const maxReplaced = (\d+)`).FindSubmatch(source)
	if found == nil {
		t.Fatal("upgrade.go has no constant maxReplaced")
	}
	replaced, err := strconv.Atoi(string(found[1]))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{strconv.Itoa((replaced+1)/2) + "G"} // 512 MiB each
	hardening := readUnit(t, "xapi-nbd.service.d/hardening.conf")
	if got := values(hardening, "MemoryMax"); !slices.Equal(got, want) {
		t.Errorf("hardening.conf: got MemoryMax=%q, want %q", got, want)
	}
	if got := values(hardening, "OOMPolicy"); !slices.Equal(got, []string{"continue"}) {
		t.Errorf("hardening.conf: got OOMPolicy=%q, want continue", got)
	}
	if got := values(readUnit(t, "xapi-nbd.service.d/memory.conf"), "MemoryLimit"); !slices.Equal(got, want) {
		t.Errorf("memory.conf: got MemoryLimit=%q, want %q", got, want)
	}
}
