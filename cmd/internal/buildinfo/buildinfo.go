// Package buildinfo returns the version of the running program.
package buildinfo

import "runtime/debug"

// version is set by the Makefile, from the file VERSION, with
// -ldflags "-X xapi-nbd/cmd/internal/buildinfo.version=…".
var version string

// Version returns the version of the program, never empty: the one that the Makefile set;
// after a plain `go build` or `go install` the toolchain's record of the module or of the
// commit; else "unknown".
func Version() string {
	if version != "" {
		return version
	}
	info, _ := debug.ReadBuildInfo()
	return fromBuildInfo(info)
}

func fromBuildInfo(info *debug.BuildInfo) string {
	if info == nil {
		return "unknown"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	settings := make(map[string]string, len(info.Settings))
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
	}
	revision := settings["vcs.revision"]
	if revision == "" {
		return "unknown"
	}
	v := "devel-" + revision[:min(12, len(revision))]
	if settings["vcs.modified"] == "true" {
		v += "-dirty"
	}
	return v
}
