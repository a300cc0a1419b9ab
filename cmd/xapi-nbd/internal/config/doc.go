// Package config has the settings of xapi-nbd: their keys, flags, defaults and ranges.
// [Load] reads them as the service does, [Inspect] reports every mistake in them.
//
// It does not know what the settings are used for, and opens none of the files and
// addresses that they name.
package config
