package buildinfo

import (
	"runtime/debug"
	"testing"
)

func TestVersion(t *testing.T) {
	if got := Version(); got == "" {
		t.Error("got an empty version")
	}
	defer func(v string) { version = v }(version)
	version = "1.2.3"
	if got := Version(); got != "1.2.3" {
		t.Errorf("got %q, want the linked one, 1.2.3", got)
	}
}

func TestFromBuildInfo(t *testing.T) {
	vcs := []debug.BuildSetting{{Key: "vcs.revision", Value: "0123456789abcdef0123"}}
	dirty := append(vcs, debug.BuildSetting{Key: "vcs.modified", Value: "true"})
	tests := []struct {
		name string
		info *debug.BuildInfo
		want string
	}{
		{"none", nil, "unknown"},
		{"module", &debug.BuildInfo{Main: debug.Module{Version: "v1.0.0"}}, "v1.0.0"},
		{"devel", &debug.BuildInfo{Main: debug.Module{Version: "(devel)"}}, "unknown"},
		{"commit", &debug.BuildInfo{Settings: vcs}, "devel-0123456789ab"},
		{"changed", &debug.BuildInfo{Settings: dirty}, "devel-0123456789ab-dirty"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := fromBuildInfo(tt.info); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}
