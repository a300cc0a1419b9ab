// Package config has the settings of xapi-nbd: their keys, flags, defaults and ranges.
// [Load] reads them as the service does, [Inspect] reports every mistake in them.
//
// It opens none of the files and addresses that the settings name.
package config
