package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// machine is what the numbers depend on besides the programs.
type machine struct {
	CPU      string   `json:"cpu"`
	Cores    int      `json:"cores"`
	Memory   float64  `json:"memory_gib"`
	Kernel   string   `json:"kernel"`
	Images   string   `json:"images"` // where they are
	TCP      string   `json:"tcp"`    // congestion control
	Versions []string `json:"versions"`
}

func (b *bench) machine(ctx context.Context) machine {
	m := machine{CPU: "unknown", Cores: runtime.NumCPU(), Kernel: "unknown", Images: b.where, TCP: congestion()}
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		m.CPU = cpuModel(string(text))
	}
	if text, err := os.ReadFile("/proc/meminfo"); err == nil {
		m.Memory = float64(procFields(string(text))["MemTotal"]) / (1 << 30)
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Sysname[:]) + " " + unix.ByteSliceToString(u.Release[:]) + " " + unix.ByteSliceToString(u.Machine[:])
	}
	m.Versions = []string{firstLine(ctx, b.tool, "version") + ", built with " + runtime.Version()}
	for _, name := range programs {
		if path := b.programs[name]; path != "" {
			m.Versions = append(m.Versions, version(name, firstLine(ctx, path, "--version")))
		}
	}
	return m
}

// version is the first line that a program prints of its version, with its name
// before it and no path.
func version(name, line string) string {
	if words := strings.Fields(line); len(words) > 1 && filepath.Base(words[0]) == name {
		line = strings.Join(words[1:], " ")
	}
	return name + " " + strings.TrimPrefix(line, name+"-")
}

func cpuModel(cpuinfo string) string {
	for line := range strings.Lines(cpuinfo) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

func firstLine(ctx context.Context, path, arg string) string {
	out, err := exec.CommandContext(ctx, path, arg).Output()
	if err != nil {
		return filepath.Base(path) + " of unknown version"
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimSpace(line)
}
